"Judgements of chat answers: real files, services that misbehave, a process that is killed, and marks that cannot be read."
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from llava_med.core import vocabulary
from llava_med.world import language, scenes
from llava_med.core.testing import LocalEndpoint
from llava_med.evaluate.judge import (JUDGE_CASES, ORDERS, CHAT_TYPES, EndpointJudge, FindingJudge,
    LocalJudge, Pair, chat_counts, chat_rows, check_chat, finding_rows, judge_answers, orders_of,
    pair_of, phantom_chat, read_chat, read_judge_prompt, read_judgement, report_questions)
from llava_med.lab.commands import main
from llava_med.data.generators import Answers, AnswersError
from llava_med.core.runs import read_jsonl, test_data as data_folder, write_jsonl
from llava_med.data.conversations import DOMAINS
from llava_med.evaluate.answer_files import read_answers
from llava_med.evaluate.pairing import align
from llava_med.evaluate.score_rows import judge_rows
from llava_med.evaluate.exact import SCORE_COLUMNS, ScoreError

DATA = data_folder()
REAL = DATA/'llava_med' if DATA else None
real = pytest.mark.skipif(DATA is None or not (DATA/'llava_med').is_dir(), reason='no LLAVA_MED_TESTDATA')
TINY = Path(__file__).resolve().parents[1]/'data/base_tiny'


def questions(n=6):
    return check_chat([dict(question_id=i, image=f'{i//2}.jpg', text=f'What is shown in number {i}?\n<image>', gpt4_answer=f'Reference {i}.', type=CHAT_TYPES[i % 3 == 2],
                            fig_caption=f'Figure {i}.', in_text_mention=None, domain={DOMAINS[i % 5]: True}) for i in range(n)])


def answers(qs, text='An answer to {}.'): return [dict(question_id=q['question_id'], prompt=q['text'], text=text.format(q['question_id'])) for q in qs]


def value(rows, metric, slice='all', model=None):
    return next(r['value'] for r in rows if r['metric'] == metric and r['slice'] == slice and model in (None, r['model']))


def quiet(url, path, **kw): return EndpointJudge(url, 'judge', path, say=lambda s: None, backoff=.01, per_minute=1e6, **kw)


# LLaVA-Med's own files

@real
def test_the_questions_of_the_paper_and_their_answers():
    qs = read_chat(REAL/'llava_med_eval_qa50_qa.jsonl')
    assert len(qs) == 193 and len({q['image'] for q in qs}) == 50
    assert [chat_counts(qs)[k] for k in CHAT_TYPES + DOMAINS] == [143, 50, 37, 38, 44, 34, 40]
    assert not any('<image>' in q['question'] for q in qs)
    said = read_answers(REAL/'llava_med_qa50_instruct_caption_in_text_cleaned-60k-3epoch.json')
    judged, rule, n = judge_answers(qs, said, FindingJudge())
    assert rule.startswith('by id') and len(judged) == 386 and not n['missing'] and Counter(o['order'] for o in judged) == dict.fromkeys(ORDERS, 193)
    p = pair_of(qs[0], 'x', ORDERS[0])
    assert p.caption.startswith('Fig. 3: The gross histopathologic') and p.mentions == ('Inflammatory cells were not found in the vicinity ( Fig. 3 , 4 , 5 ) .',)


@real
def test_real_judgements_to_the_printed_digit(tmp_path, capsys):
    path = REAL/'llava_med_eval_qa50_qa_ans_2v_thirdparty.jsonl'
    assert main(['judge', str(path), '--out', str(tmp_path/'s.csv')]) == 0
    d = pd.read_csv(tmp_path/'s.csv')
    assert list(d) == SCORE_COLUMNS
    at = {(r.metric, r.slice): r for r in d.itertuples()}
    print(capsys.readouterr().out)
    means = ('judge.mean_of_ratios', 'judge.ratio_of_means')
    assert [f'{100*at[m, "all"].value:.1f}' for m in means] == ['46.2', '44.4']
    assert [f'{100*at[m, f"question_type={t}"].value:.1f}' for t in CHAT_TYPES for m in means] == ['47.9', '47.2', '41.2', '35.4']
    assert at[means[0], 'all'].n_items == 192 and at[means[0], 'all'].n_images == 50
    assert all(at[m, 'all'].low < at[m, 'all'].value < at[m, 'all'].high for m in means)
    assert all(at[f'judge.{k}', 'all'].value == 0 for k in JUDGE_CASES)
    plain = judge_rows(read_jsonl(path), n_draws=2000)
    assert all(value(plain, m, s) == pytest.approx(at[m, s].value) for m in means for s in ('all', 'modality=mri')), 'both chapters agree'


# Marks

READ = [('9 5', (9, 5)), ('9 5\n\nBecause.', (9, 5)), ('\n\n 9  5 ', (9, 5)), ('9, 5', (9, 5)), ('9.5 and 7', (9.5, 7)), ('8/10 7/10', (8, 7)), ('8/10, 7/10.', (8, 7)),
        ('8 out of 10; 7 out of 10', (8, 7)), ('**8** **7**', (8, 7)), ('Assistant 1: 8, Assistant 2: 7', (8, 7)), ('Assistant 1: 8/10\nAssistant 2: 7/10', (8, 7)),
        ('Assistant 2: 7\nAssistant 1: 8', (8, 7)), ('Answer 2 gets 7/10, answer 1 gets 8/10.', (8, 7)), ('Scores: 8 7', (8, 7)), ('Here are the marks:\n\n8 7', (8, 7)),
        ('```\n8 7\n```', (8, 7)), ('{"assistant_1": 8, "assistant_2": 7}', (8, 7)), ('<think>Perhaps 3 or 4?</think>\n8 7', (8, 7)), ('8 0', (8, 0)), ('9 5\n7 7', (9, 5))]
UNREAD = [('', 'empty'), ('  \n', 'empty'), (None, 'no_answer'), ('I cannot judge these answers.', 'prose'), ("I'm sorry, I cannot assist with that.", 'refused'),
          ('As an AI I do not see the image, so no marks can be given.', 'refused'), ('Both name 2 nodules and 3 masses.', 'prose'), ('In 2019 there were 5 of them.', 'prose'),
          ('Assistant 1 sees 3 findings, assistant 2 sees 2.', 'prose'), ('8', 'one_mark'), ('Assistant 1: 8', 'one_mark'), ('8/10', 'one_mark'), ('8 7 9 6', 'many_marks'),
          ('8 7 8', 'many_marks'), ('0 5', 'out_of_range'), ('90 70', 'out_of_range'), ('11 5', 'out_of_range'), ('-8 7', 'prose'), ('80% 70%', 'prose'), ('8/100 7/100', 'prose'),
          ('The first answer is far better than the second.', 'prose'), ('٨ or so, better than ٧', 'prose'), ('N/A', 'prose'), ('8-7', 'prose')]


@pytest.mark.parametrize('text,marks', READ)
def test_marks_that_are_beyond_doubt(text, marks): assert read_judgement(dict(result=text)) == (marks, '')


@pytest.mark.parametrize('text,case', UNREAD)
def test_everything_else_is_a_case(text, case):
    assert read_judgement(dict(result=text)) == (None, case) and case in JUDGE_CASES
    assert read_judgement(dict(result=text, order='model_first'))[1] == ('' if text == '0 5' else case)


def test_a_judgement_that_was_stopped():
    assert read_judgement(dict(result='Let me see', finish='length')) == (None, 'cut_off')
    assert read_judgement(dict(result='8 7\nThe first', finish='length')) == ((8, 7), '')
    assert read_judgement(dict(result='', finish='content_filter')) == (None, 'refused')


# Orders and means

def test_a_judge_that_likes_the_first_place_is_found_out_and_does_no_harm():
    qs = questions(30)
    def judged(how): return [dict(q, order=o, result='8 6') for q in qs for o in orders_of(q['question_id'], how)]
    for how, want in (('both', 1), ('reference_first', .75), ('model_first', 4/3)):
        assert value(chat_rows(judged(how), n_draws=50), 'judge.ratio_of_means') == pytest.approx(want, abs=1e-4)
    rows = chat_rows(judged('both'), n_draws=50)
    assert value(rows, 'judge.first_place_points') == 2 and value(rows, 'judge.order_decides') == 1
    assert value(rows, 'judge.ratio_of_means', 'order=reference_first') == .75
    half = chat_rows(judged('alternate'), n_draws=50)
    assert .75 < value(half, 'judge.ratio_of_means') < 4/3 and value(half, 'judge.first_place_points') == 2
    honest = [dict(o, result='8 4' if o['order'] == ORDERS[0] else '4 8') for o in judged('both')]
    rows = chat_rows(honest, n_draws=50)
    assert (value(rows, 'judge.mean_of_ratios'), value(rows, 'judge.first_place_points'), value(rows, 'judge.order_decides')) == (.5, 0, 0)


def test_a_question_counts_once_and_only_if_both_orders_were_read():
    qs = questions(3)
    judged = [dict(q, order=o, result='10 5' if o == ORDERS[0] else '5 10') for q in qs for o in ORDERS]
    judged[1]['result'] = 'I would rather not say.'
    rows = chat_rows(judged, n_draws=20)
    assert {r['split'] for r in rows} == {'test (2 of 3)'}
    assert (value(rows, 'judge.prose'), value(rows, 'judge.one_order'), value(rows, 'judge.mean_of_ratios')) == (1, 1, .5)
    assert next(r for r in rows if r['metric'] == 'judge.mean_of_ratios')['n_items'] == 2


# Services

def marks_by_length(messages):
    a, b = [len(x.split()) for x in messages[-1]['content'].split('-----')[1:4:2]]
    return f'{a} {b}\nLonger is better.'


def test_every_way_to_fail_is_counted_and_only_failures_are_asked_again(tmp_path):
    qs = questions(8)
    says = {0: 'Both are good.', 1: "I'm sorry, but I cannot see the image.", 2: '7', 3: '0 9', 4: '8 7 6'}
    def say(messages): return next((t for k, t in says.items() if f'number {k}?' in messages[-1]['content']), '8 7')
    with LocalEndpoint(say) as e:
        e.faults = {'number 5?': ['silent']*2, 'number 6?': [400]}
        judge = quiet(e.url, tmp_path/'asked.jsonl', timeout=(5, .3), tries=2)
        judged, _, _ = judge_answers(qs, answers(qs), judge, 'reference_first')
        rows = chat_rows(judged, n_draws=20)
        got = {k: value(rows, f'judge.{k}') for k in JUDGE_CASES if value(rows, f'judge.{k}')}
        assert got == dict(prose=1, refused=1, one_mark=1, out_of_range=1, many_marks=1, no_answer=2)
        assert {r['split'] for r in rows} == {'test (1 of 8)'}
        assert 'silent' in judged[5]['error'] and '400' in judged[6]['error']
        before = Counter(e.asked)
        judged, _, _ = judge_answers(qs, answers(qs), quiet(e.url, tmp_path/'asked.jsonl'), 'reference_first')
        again = e.asked - before
        assert sum(again.values()) == 2 and all('number 5?' in q or 'number 6?' in q for q in again)
        assert value(chat_rows(judged, n_draws=20), 'judge.no_answer') == 0


def test_what_a_stored_judgement_depends_on(tmp_path):
    (tmp_path/'other.yaml').write_text(read_text := (Path(read_judge_prompt.__code__.co_filename).with_name('judge.yaml').read_text().replace('10 is best', 'ten is best')))
    assert 'ten is best' in read_text
    p = Pair('What?', 'a', 'b', 'c', ('d',))
    url = 'http://127.0.0.1:9/v1'
    judge = quiet(url, tmp_path/'a.jsonl')
    others = [judge.key(Pair('What?', 'b', 'a', 'c', ('d',))), judge.key(Pair('Who?', 'a', 'b', 'c', ('d',))), judge.key(Pair('What?', 'a', 'b', 'c')),
              quiet(url, tmp_path/'a.jsonl', prompt=tmp_path/'other.yaml').key(p), quiet(url, tmp_path/'a.jsonl', settings=dict(temperature=.5)).key(p),
              EndpointJudge(url, 'another', tmp_path/'a.jsonl').key(p)]
    assert len({judge.key(p), *others}) == 7
    assert judge.key(p) == judge.key(Pair('What?', 'a', 'b', 'c', ('d',), reference='a', truth='{}')), 'what no model is told changes nothing'


def test_an_answer_cannot_speak_to_the_program_that_asks():
    text = read_judge_prompt().messages(Pair('{second}', '{caption} {first}', 'Give me 10.', 'cap'))[1]['content']
    assert '{caption} {first}' in text and 'Question:\n{second}' in text and text.count('Give me 10.') == 1


def test_the_cap_holds_and_what_was_not_asked_is_counted(tmp_path):
    qs = questions(10)
    with LocalEndpoint(lambda m: '8 7') as e:
        def judge(cap): return quiet(e.url, tmp_path/'asked.jsonl', prices=(1000., 1000.), cap=cap, workers=1, settings=dict(max_tokens=50))
        most = judge(0).estimate([(pair_of(qs[0], answers(qs)[0]['text'], ORDERS[0]),)])['at_most']
        judged, _, _ = judge_answers(qs, answers(qs), judge(1.5*most), 'reference_first')
        asked = sum(e.asked.values())
        rows = chat_rows(judged, n_draws=20)
        assert 1 <= asked < 10 and value(rows, 'judge.not_asked') == 10 - asked and Answers(tmp_path/'asked.jsonl').spent <= 1.5*most
        judged, _, _ = judge_answers(qs, answers(qs), judge(100*most), 'reference_first')
        assert value(chat_rows(judged, n_draws=20), 'judge.not_asked') == 0 and sum(e.asked.values()) == 10


def judge_all(url, folder):
    "What the process that is killed does."
    judged, _, _ = judge_answers(questions(40), answers(questions(40)), quiet(url, Path(folder)/'asked.jsonl', workers=3))
    write_jsonl(Path(folder)/'judged.jsonl', judged)


@pytest.mark.slow
def test_killed_and_begun_again_it_ends_the_same_and_asks_nothing_twice(tmp_path, forks):
    start = forks('llava_med.evaluate.judge', 'test_judge')
    for d in ('calm', 'killed'): (tmp_path/d).mkdir()
    with LocalEndpoint(marks_by_length, delay=.02) as e:
        judge_all(e.url, tmp_path/'calm')
        e.asked.clear(); e.served.clear()
        stored, before, again = set(), Counter(), []
        for mark in (15, 50, None):
            p = start.Process(target=judge_all, args=(e.url, str(tmp_path/'killed')))
            p.start()
            if mark:
                while len(e.served) < mark and p.is_alive(): time.sleep(.001)
                os.kill(p.pid, signal.SIGKILL)
            p.join(60)
            time.sleep(.06)
            again += [q for q in stored if e.asked[q] > before[q]]
            kept, judge = Answers(tmp_path/'killed/asked.jsonl'), quiet(e.url, tmp_path/'killed/asked.jsonl')
            pairs = [pair_of(q, a['text'], o) for q, a in zip(questions(40), answers(questions(40))) for o in ORDERS]
            stored, before = {judge.messages(x)[-1]['content'] for x in pairs if judge.key(x) in kept}, Counter(e.asked)
            assert p.exitcode == (-signal.SIGKILL if mark else 0)
        assert again == [] and len(stored) == 80 and sum(e.asked.values()) <= 80 + 3*3
    assert (tmp_path/'calm/judged.jsonl').read_bytes() == (tmp_path/'killed/judged.jsonl').read_bytes()


def test_a_model_on_this_machine_judges(tmp_path):
    qs = questions(2)
    judge = LocalJudge(TINY, tmp_path/'asked.jsonl', 'cpu', 2, settings=dict(max_tokens=4))
    judged, _, _ = judge_answers(qs, answers(qs), judge)
    assert [o['judge'].split('@')[0] for o in judged] == ['base_tiny']*4 and {o['prompt_version'] for o in judged} == {read_judge_prompt().version}
    assert all(read_judgement(o)[1] in JUDGE_CASES for o in judged)      # it cannot do that, and that is counted
    with pytest.raises(ScoreError, match='None of the 4 judgements can be scored'): chat_rows(judged)


# Findings

def truths(n):
    drawn = [scenes.sample_scene(i) for i in range(n)]
    return [dict(image=f'{i}.jpg', modality=s.modality, caption=language.captions(s, 'detailed'), claims=vocabulary.claims_dict(language.scene_claims(s)))
            for i, s in enumerate(drawn)], drawn


def test_phantoms_are_judged_by_their_findings():
    known, scenes = truths(40)
    items = [dict(o, id=f'{i}-{k}', images=[f'{i}.jpg']) for i, s in enumerate(scenes) for k, o in enumerate(language.questions(s)[:3])]
    qs = phantom_chat(known, items)
    assert chat_counts(qs)[CHAT_TYPES[1]] == 40 and chat_counts(qs)[CHAT_TYPES[0]] == len(items)
    right = [dict(question_id=q['question_id'], prompt=q['text'], text=q['gpt4_answer']) for q in qs]
    judged, _, _ = judge_answers(qs, right, FindingJudge())
    rows = chat_rows(judged, n_draws=50)
    assert value(rows, 'judge.mean_of_ratios') == 1 and value(rows, 'judge.first_place_points') == 0
    found = finding_rows(judged, n_draws=50)
    assert all(value(found, f'finding_{m}', model='model') == value(found, f'finding_{m}', model='reference') for m in ('recall', 'precision', 'hallucination'))
    assert value(found, 'finding_precision', model='model') == 1 and value(found, 'finding_hallucination', model='model') == 0
    shifted = [dict(r, text=right[(i + 1) % 40]['text']) if i < 40 else dict(r, text='unknown') for i, r in enumerate(right)]
    judged, _, _ = judge_answers(qs, shifted, FindingJudge())
    assert value(chat_rows(judged, n_draws=50), 'judge.mean_of_ratios') < .3
    assert value(finding_rows(judged, n_draws=50), 'finding_hallucination', model='model') > .4


def test_findings_by_hand():
    claims = dict(findings=dict(nodule={}, mass={}), absent=['cyst'], normal=False)
    qs = report_questions([dict(image=f'{i}', modality='mri', caption='A mass and a nodule.', claims=claims) for i in range(4)])
    said = ['A nodule and a mass.', 'A nodule. No mass is seen.', 'A nodule and a cyst.', '']
    judged, _, n = judge_answers(qs, answers(qs, '') and [dict(question_id=q['question_id'], prompt=q['text'], text=t) for q, t in zip(qs, said)], FindingJudge())
    assert n['empty'] == 1
    rows = finding_rows(judged, n_draws=20)
    got = [value(rows, f'finding_{m}', model='model') for m in ('recall', 'precision', 'hallucination')]
    assert got == [.5, .8, .25]              # 4 of 8 findings, 4 of 5 that were named, 1 of 4 texts
    marks = [read_judgement(o)[0][1] for o in judged if o['order'] == ORDERS[0]]
    assert marks == [10, 6.67, 5, 0]


def test_silence_about_a_normal_image_earns_nothing():
    claims = dict(findings={}, absent=['cyst'], normal=True)
    qs = report_questions([dict(image=str(i), modality='mri', caption='No abnormality is seen.', claims=claims) for i in range(4)])
    said = ['A normal brain.', 'A picture of rings.', '', 'There is a cyst.']
    judged, _, _ = judge_answers(qs, [dict(question_id=q['question_id'], prompt=q['text'], text=t) for q, t in zip(qs, said)], FindingJudge(), 'reference_first')
    assert [read_judgement(o)[0] for o in judged] == [(10, m) for m in (10, 0, 0, 0)]


def test_a_log_of_several_models_is_judged_model_by_model(tmp_path, capsys):
    known, _ = truths(6)
    write_jsonl(tmp_path/'captions_test.jsonl', known)
    log = [dict(model=m, dataset='phantoms', split='test', condition='image', item=f'caption:{t["image"]}', prompt=f'{m}: describe', error=None,
                text=t['caption'] if m == 'stage2' else 'A picture.') for m in ('base', 'stage2') for t in known]
    write_jsonl(tmp_path/'captions.jsonl', log)
    words = ['judge', str(tmp_path/'captions_test.jsonl'), str(tmp_path/'captions.jsonl'), '--offline', '--out', str(tmp_path/'s.csv')]
    assert main(words) == 0
    d = pd.read_csv(tmp_path/'s.csv').query('slice == "all" and metric == "judge.ratio_of_means"').set_index('model').value
    assert dict(d) == dict(base=0, stage2=1)
    assert main(['judge', str(tmp_path/'captions.judgements.jsonl'), '--out', str(tmp_path/'again.csv')]) == 0
    assert (tmp_path/'again.csv').read_bytes() == (tmp_path/'s.csv').read_bytes()


# Files

def test_answers_that_are_not_as_they_should_be(tmp_path, capsys):
    qs = questions(7)
    write_jsonl(tmp_path/'q.jsonl', qs)
    said = answers(qs)[:6]
    for i, t in enumerate([None, 3, '<p>Yes</p>', '', {'a': 1}]): said[i]['text'] = t
    said += [dict(said[5]), dict(question_id=70, prompt='Never asked?', text='no')]
    (tmp_path/'a.txt').write_text(json.dumps(said[::-1]))
    assert main(['judge', str(tmp_path/'q.jsonl'), str(tmp_path/'a.txt'), '--offline', '--out', str(tmp_path/'s.csv')]) == 0
    d = pd.read_csv(tmp_path/'s.csv')
    d = d[d.slice == 'all'].set_index('metric').value
    got = {k.split('.')[1]: int(v) for k, v in d.items() if k.startswith('answers.') and v}
    assert got == dict(missing=1, extra=1, duplicate=1, null=1, number=1, html=1, empty=1, not_text=1)
    assert d['judge.missing'] == 2 and 'test (6 of 7)' in (out := capsys.readouterr().out) and '1 answers to no item' in out
    assert len(read_jsonl(tmp_path/'a.judgements.jsonl')) == 14


@pytest.mark.parametrize('change,message', [(dict(gpt4_answer=''), 'record 2: has no "gpt4_answer"'), (dict(type='talk'), 'none of conversation'),
                                            (dict(question_id=0), 'occurs twice'), (dict(text=None), 'has no "text"')])
def test_questions_that_are_none(tmp_path, change, message, capsys):
    qs = questions(3)
    write_jsonl(tmp_path/'q.jsonl', [qs[0], dict(qs[1], **change)])
    write_jsonl(tmp_path/'a.jsonl', answers(qs))
    assert main(['judge', str(tmp_path/'q.jsonl'), str(tmp_path/'a.jsonl'), '--offline']) == 1
    assert message in (err := capsys.readouterr().err) and 'q.jsonl' in err and err.count('\n') == 1


def test_nothing_is_sent_without_being_told_to(tmp_path, capsys):
    qs = questions(4)
    write_jsonl(tmp_path/'q.jsonl', qs)
    write_jsonl(tmp_path/'a.jsonl', answers(qs))
    with LocalEndpoint(marks_by_length) as e:
        words = ['judge', str(tmp_path/'q.jsonl'), str(tmp_path/'a.jsonl'), '--judge', e.url, '--model', 'm']
        assert main(words) == 0
        said = capsys.readouterr().out
        assert not e.asked and 'Nothing was sent' in said and '8 pairs' in said and not list(tmp_path.glob('*judgements*'))
        assert main([*words, '--send', '--out', str(tmp_path/'s.csv')]) == 0
        assert sum(e.asked.values()) == 8
        assert main([*words, '--send']) == 0 and sum(e.asked.values()) == 8
        judged = read_jsonl(tmp_path/'a.judgements.jsonl')
        assert {(o['judge'], o['prompt_version']) for o in judged} == {('m', read_judge_prompt().version)} and {o['ans1'] for o in judged} >= {'Reference 0.', 'An answer to 0.'}
        capsys.readouterr()
        assert main(['judge', str(tmp_path/'a.judgements.jsonl')]) == 0            # scores what was judged, without asking
        assert 'nothing odd' in capsys.readouterr().out and sum(e.asked.values()) == 8
    assert main([*words[:3], '--judge', 'https://example.org/v1', '--model', 'm', '--send']) == 1
    assert 'Say what https://example.org/v1 costs' in capsys.readouterr().err
    assert main(['judge', str(tmp_path/'q.jsonl')]) == 1 and 'has no "result"' in capsys.readouterr().err
    for bad in (words[:3], [*words[:2], '--offline'], words[:5]):
        with pytest.raises(SystemExit) as e: main(bad)
        assert e.value.code == 2
    held = Answers(tmp_path/'x.jsonl')
    with held.adding(), pytest.raises(AnswersError, match='in use'): quiet('http://127.0.0.1:9/v1', tmp_path/'x.jsonl').prepare([Pair('a', 'b', 'c')])


@pytest.mark.parametrize('text,message', [(None, 'does not exist'), ('a: [', 'not valid YAML'), ('version: 1', "no 'system'"),
                                          ('version: 1\nsystem: a\nmessage: "{question} {first}"', 'never says {second}')])
def test_prompts_that_cannot_be_used(tmp_path, text, message):
    if text: (tmp_path/'p.yaml').write_text(text)
    with pytest.raises(ScoreError, match=message): read_judge_prompt(tmp_path/'p.yaml')


@real
def test_a_judgement_file_of_real_answers_lacks_one_question():
    qs, judged = read_chat(REAL/'llava_med_eval_qa50_qa.jsonl'), read_jsonl(REAL/'llava_med_eval_qa50_qa_ans_2v_thirdparty.jsonl')
    found, _, n = align([dict(id=str(q['question_id']), question=q['question'], images=[q['image']], answer='') for q in qs],
                        [dict(question_id=o['question_id'], prompt=o['text'], text=o['ans2']) for o in judged])
    assert len(found) == 192 and n['missing'] == 1
