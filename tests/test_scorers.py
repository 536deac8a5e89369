"Golden values of other people's scores, real answer files and judgements, and files that are not as they should be."
import json
import re
import time
from collections import Counter

import numpy as np
import pytest

from llava_med.core.registry import UnknownName
from llava_med.lab.commands import main
from llava_med.core.runs import read_jsonl, test_data as data_folder, write_jsonl
from llava_med.evaluate.answer_files import read_answers
from llava_med.evaluate.exact import ScoreError
from llava_med.evaluate.pairing import align
from llava_med.evaluate.score_rows import judge_rows, score_answers, score_files
from llava_med.evaluate.scorers import SCORERS, strict_scores
from llava_med.evaluate.exact import SCORE_COLUMNS, score_table
from llava_med.data.vqa_readers import read_vqa
from llava_med.data.vqa import same_question

DATA = data_folder()
real = pytest.mark.skipif(DATA is None or not (DATA/'llava_med').is_dir(), reason='no LLAVA_MED_TESTDATA')


def item(answer, n=0, closed=True, **kw):
    return dict(id=f'q{n}', images=[f'{n}.png'], question=f'What about {n}?', answer=answer, answer_type='CLOSED' if closed else 'OPEN',
                source='toy', split='test', options=[], tags={}, regions=[], twin_of=None) | kw


# gold, answer, then: published, gated, MedEvalKit, lmms-eval's SLAKE, strict; None where the reference gives none
CROSS = [('No', 'Yes, it is abnormal', 1, 1, 0, 0, 0), ('No', 'The lungs are normal', 1, 1, 1, 0, 0), ('No', 'unknown', 1, 1, 1, 0, 0),
         ('No', 'No.', 1, 1, 1, 1, 1), ('Yes', 'Yes, there is an abnormality', 1, 1, 0, 0, 1), ('Yes', 'Yes and no', 1, 1, 0, 0, 0),
         ('No', 'Yes and no', 1, 1, 0, 0, 0), ('Yes', 'There is a fracture', 0, 0, 0, 0, 0),
         ('No', 'There is not any fracture', 1, 1, 1, 0, 0), ('Yes', 'yes no', 1, 1, 0, 0, 0), ('CT', 'This is a CT scan', 1, 0, None, 0, None),
         ('Left', 'left lung', 1, 0, None, 0, None), ('Yes', '', 0, 0, 0, 0, 0), ('No', 'Yes. There is nothing else.', 1, 1, 0, 0, 0)]


@pytest.mark.parametrize('row', CROSS)
def test_closed_answers_under_all_rules(row):
    gold, text, *want = row
    o = item(gold)
    v1 = SCORERS['llavamed_v1'](o, text)
    got = [v1['closed_substring'], v1['closed_gated'], SCORERS['medevalkit'](o, text).get('closed'), SCORERS['lmms_slake'](o, text)['accuracy'],
           SCORERS['strict'](o, text)['closed'] if want[4] is not None else None]
    assert got == want


OPEN = [('left lung', 'left left left', 0, .33, .86, 1, .75), ('left lung', 'The lesion is in the left lung', 1, .40, .57, .40, 1),
        ('left lung', 'right lung', 0, .5, .5, .5, .5), ('right upper lobe', 'upper right lobe', 0, 1, 1, 1, 1),
        ('A/P view', 'AP view', 1, .5, .5, .5, .5), ('none', 'no finding', 0, 0, 0, 0, 0), ('A', 'this is B', 1, 0, 0, 0, 0),
        ('1.5 cm', '1.5cm', 0, 0, 0, 0, 0)]


@pytest.mark.parametrize('row', OPEN)
def test_open_answers_as_published(row):
    gold, text, *want = row
    s = SCORERS['llavamed_v1'](item(gold, closed=False), text)
    assert [s[f'open_{k}'] for k in ('substring', 'exact_match', 'f1', 'precision', 'recall')] == pytest.approx(want, abs=.0051)


def test_repetition_pays_only_under_the_published_rule():
    o = item('heart and lungs', closed=False)
    v1, ours = (SCORERS[s](o, 'the heart heart heart is enlarged') for s in ('llavamed_v1', 'strict'))
    assert (v1['open_recall'], round(ours['open_recall'], 3)) == (.6, .333)


def test_constant_answer_yes_no():
    items = [item(a, i) for i, a in enumerate(['yes', 'No']*10)]
    rows, _ = score_answers(items, [dict(prompt=o['question'], text='yes no') for o in items], n_draws=50)
    value = {r['metric']: r['value'] for r in rows if r['slice'] == 'all'}
    assert (value['llavamed_v1.closed_substring'], value['strict.closed'], value['medevalkit.closed']) == (1, 0, 0)


# recall, precision, F1, "exact match", open substring, closed gated, closed ungated, closed with wrong ones dropped, and how many were not
GOLDEN = {'v1_vqarad_answer-file-llava-zeroshot': ('12.04 1.71 2.80 1.29 7.82 28.68 30.15 34.98', 223),
          'v1_vqarad_answer-file': ('17.53 2.80 4.54 2.61 11.17 47.06 48.53 72.73', 176),
          'v1_vqarad_answer-file-1epoch': ('2.04 2.89 2.24 2.89 1.68 23.16 24.26 28.51', 221)}
NAMES = ('open_recall', 'open_precision', 'open_f1', 'open_exact_match', 'open_substring', 'closed_gated', 'closed_substring',
         'closed_gated_dropped')


@real
@pytest.mark.parametrize('items', ['testset.json', 'VQA_RAD Dataset Public.json', ''])
@pytest.mark.parametrize('name', GOLDEN)
def test_real_answer_files_to_the_printed_digit(name, items, tmp_path, capsys):
    out = tmp_path/'scores.csv'
    assert main(['score', str(DATA/'vqa_rad'/items), str(DATA/'llava_med'/f'{name}.jsonl'), '--scorer', 'llavamed_v1', '--out', str(out)]) == 0
    import pandas as pd
    d = pd.read_csv(out)
    assert list(d) == SCORE_COLUMNS and set(d.split) == {'test'} and set(d.model) == {name}
    d = d[d.slice == 'all'].set_index('metric')
    want, n = GOLDEN[name]
    assert ' '.join(f'{100*d.value[f"llavamed_v1.{k}"]:.2f}' for k in NAMES) == want
    assert d.n_items['llavamed_v1.closed_gated_dropped'] == n
    assert (d.n_items['llavamed_v1.open_recall'], d.n_items['llavamed_v1.closed_gated']) == (179, 272)
    assert d.n_images['answers.missing'] == 203 and d.value['answers.missing'] == 0
    said = capsys.readouterr().out
    assert '451 of 451 vqa_rad test items paired by ' + ('id' if 'Public' in items else 'question text') in said
    assert f'{100*d.value["llavamed_v1.closed_gated"]:.2f}%' in said and f'{len(pd.read_csv(out))} rows in all' in said


@real
def test_a_perfect_predictor_meets_the_gate():
    items = read_vqa(DATA/'vqa_rad/testset.json')
    rows, _ = score_answers(items, [dict(prompt=o['question'], text=o['answer']) for o in items], n_draws=20)
    value = {r['metric']: (round(100*r['value'], 2), r['n_items']) for r in rows if r['slice'] == 'all'}
    assert value['llavamed_v1.closed_gated'] == (93.38, 272)
    assert value['strict.yes_no'] == (100, 251) and value['strict.closed'] == (100, 272) and value['strict'] == (100, 451)
    slake = read_vqa(DATA/'slake', 'test')
    rows, _ = score_answers(slake, [dict(item=o['id'], prompt=o['question'], text=o['answer']) for o in slake], n_draws=20)
    value = {r['metric']: (round(100*r['value'], 2), r['n_items']) for r in rows if r['slice'] == 'all'}
    assert value['llavamed_v1.closed_gated'] == (85.34, 416) and value['strict.yes_no'][1] == 355


@real
def test_real_judgements():
    rows = judge_rows(read_jsonl(DATA/'llava_med/llava_med_eval_qa50_qa_ans_2v_thirdparty.jsonl'), n_draws=100)
    got = {(r['metric'], r['slice']): round(100*r['value'], 1) for r in rows}
    assert got['judge.mean_of_ratios', 'all'] == 46.2 and got['judge.ratio_of_means', 'all'] == 44.4
    types = 'question_type=conversation', 'question_type=detailed_description'
    assert [got[f'judge.{m}', t] for t in types for m in ('mean_of_ratios', 'ratio_of_means')] == [47.9, 47.2, 41.2, 35.4]
    assert got['judge.unread', 'all'] == 0 and {r['n_items'] for r in rows if r['slice'] == 'all'} == {192}


@real
def test_real_files_in_another_order_and_incomplete():
    items, rows = read_vqa(DATA/'vqa_rad/testset.json'), read_answers(DATA/'llava_med/v1_vqarad_answer-file.jsonl')
    found, _, n = align(items, rows[::-1])
    often = sum(c for c in Counter(same_question(o['question']) for o in items).values() if c > 1)
    assert often == 39 == n['ambiguous'] == n['missing'] and len(found) == 412     # equal questions cannot be told apart
    whole = align(items, rows)[0]
    assert all(found[k]['text'] == whole[k]['text'] for k in found)
    out, notes = score_answers(items, rows[:400], ['strict'], n_draws=20)
    assert {r['split'] for r in out} == {f'test ({len(align(items, rows[:400])[0])} of 451)'}
    assert 'items without an answer' in notes[0]


def test_nothing_is_dropped_silently(tmp_path, capsys):
    items = [item(a, i) for i, a in enumerate(['yes ', 3, 'no', 'Yes', 'no', '', 'left'])]
    said = ['<p>Yes&nbsp;</p>', 3, None, '', dict(a=1), 'x', 'Left']
    rows = [dict(question_id=9 - i, prompt=o['question'] + '\n<image>', text=t) for i, (o, t) in enumerate(zip(items, said))][::-1]
    rows += [rows[0], dict(question_id=70, prompt='Never asked?', text='no')]
    write_jsonl(tmp_path/'items.jsonl', items)
    (tmp_path/'answers.txt').write_text(json.dumps(rows, indent=1))
    assert main(['score', str(tmp_path/'items.jsonl'), str(tmp_path/'answers.txt'), '--out', str(tmp_path/'s.csv')]) == 0
    import pandas as pd
    d = pd.read_csv(tmp_path/'s.csv')
    d = d[d.slice == 'all'].set_index('metric')
    counts = {k.split('.')[1]: int(v) for k, v in d.value.items() if k.startswith('answers.') and v}
    assert counts == dict(extra=1, duplicate=1, null=1, number=1, not_text=1, empty=1, html=1, empty_key=1)
    assert d.low['answers.extra'] != d.low['answers.extra']                # a count has no interval
    assert d.value['strict.closed'] == round(3/7, 4)
    assert '1 answers with HTML in them' in capsys.readouterr().out


def test_failed_answers_are_wrong_and_repeated_ones_are_not():
    items = [item('yes', i) for i in range(4)]
    log = [dict(model='m', dataset='d', split='test', condition='image', item=o['id'], prompt=o['question'], text='yes', error=None) for o in items]
    failed = dict(log[0], text=None, error='no memory')
    def value(rows): return {r['metric']: r['value'] for r in score_answers(items, rows, ['strict'], n_draws=9)[0] if r['slice'] == 'all'}
    assert value([failed] + log[1:])['strict'] == .75 and value([failed] + log[1:])['answers.error'] == 1
    assert value([failed] + log)['strict'] == 1 and value([failed] + log)['answers.repeated'] == 1
    assert value(log + log[1:2])['answers.duplicate'] == 1 and value(log + log[1:2])['strict'] == 1
    differ = score_answers(items, log + [dict(log[1], text='no')], ['strict'], n_draws=9)[0]   # two answers that differ: neither counts
    assert {r['split'] for r in differ} == {'test (3 of 4)'} and {r['value'] for r in differ if r['metric'] == 'answers.conflict'} == {2}


def test_a_difference_says_that_a_side_is_incomplete():
    items = [item('yes', i) for i in range(6)]
    def log(m, n, text): return [dict(model=m, dataset='d', split='test', condition='image', item=o['id'], prompt=o['question'], text=text)
                                 for o in items[:n]]
    rows, _ = score_answers(items, log('stage2', 6, 'yes') + log('base', 4, 'no'), ['strict'], n_draws=9)
    got = {r['model']: (r['split'], r['value'], r['n_items']) for r in rows if r['metric'] == 'strict.closed' and r['slice'] == 'all'}
    assert got == {'stage2': ('test', 1, 6), 'base': ('test (4 of 6)', 0, 4), 'stage2-base': ('test (4 of 6)', 1, 4)}


@pytest.mark.parametrize('text,message', [('', 'holds no answers'), ('[{"prompt": "a", "text": 1}', 'neither JSON nor JSON Lines .record 2'),
    ('{"prompt": "a", "text": 1}\n{"prompt"', 'line 2: not valid JSON'), ('{"prompt": "a"}', 'record 1: has no "text"'), ('[1]', 'record 1')])
def test_damaged_files_are_named(tmp_path, text, message, capsys):
    (tmp_path/'answers.jsonl').write_text(text)
    with pytest.raises(ScoreError, match=message): read_answers(tmp_path/'answers.jsonl')
    write_jsonl(tmp_path/'items.jsonl', [item('yes')])
    assert main(['score', str(tmp_path/'items.jsonl'), str(tmp_path/'answers.jsonl')]) == 1
    assert 'answers.jsonl' in capsys.readouterr().err


def test_other_questions_and_unknown_rules_are_refused(tmp_path, capsys):
    write_jsonl(tmp_path/'items.jsonl', [item('yes')])
    (tmp_path/'a.json').write_text('\ufeff' + json.dumps([dict(prompt='Other?', text='yes')]), encoding='utf-8')
    assert main(['score', str(tmp_path/'items.jsonl'), str(tmp_path/'a.json')]) == 1
    assert '1 of its 1 answers cannot be paired' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: main(['score', str(tmp_path/'items.jsonl'), str(tmp_path/'a.json'), '--scorer', 'best'])
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert all(repr(s) in said or s in said for s in SCORERS)
    with pytest.raises(UnknownName, match="no scorer named 'best'. Known: llavamed_v1"): score_files(tmp_path/'items.jsonl', tmp_path/'a.json', 'best')
    (tmp_path/'b.json').write_bytes(b'\xff\xfe\x00')
    assert main(['score', str(tmp_path/'items.jsonl'), str(tmp_path/'b.json')]) == 1
    assert 'b.json: is not UTF-16-LE text in line 1; save it as UTF-8' in capsys.readouterr().err


def test_a_folder_is_no_output_file(tmp_path, capsys):
    write_jsonl(tmp_path/'items.jsonl', [item('yes')])
    write_jsonl(tmp_path/'answers.jsonl', [dict(prompt='What about 0?', text='yes')])
    (tmp_path/'out').mkdir()
    words = ['score', str(tmp_path/'items.jsonl'), str(tmp_path/'answers.jsonl'), '--out']
    assert main([*words, str(tmp_path/'out')]) == 1
    said = capsys.readouterr()
    assert 'out is a folder' in said.err and not said.out and not list((tmp_path/'out').iterdir())
    assert main([*words, str(tmp_path/'out/scores.csv')]) == 0


def test_ten_thousand_answers_in_ten_seconds():
    rng = np.random.default_rng(0)
    items = [item(('yes', 'left lung')[i % 2], i, i % 2 == 0, images=[f'{i//2}.png'],
                  tags=dict(question_type=str(i % 9), modality=str(i % 5))) for i in range(10_000)]
    answers = [dict(prompt=o['question'], text=str(rng.choice(['yes', 'no', 'in the left lung', 'right lung']))) for o in items]
    start = time.process_time()   # of this process: what else runs does not count
    rows, _ = score_answers(items, answers, n_draws=10_000)
    took = time.process_time() - start
    assert took < 10 and len(rows) > 100, took


def test_strict_is_the_same_in_both_chapters():
    rng = np.random.default_rng(1)
    items = [item(('yes', 'no')[i % 2], i, images=[f'{i//6}.png'], twin_of=f'q{i ^ 1}', tags=dict(question_type=str(i % 3))) for i in range(60)]
    log = [dict(model=m, dataset='d', split='test', condition='image', item=o['id'], prompt=o['question'], error=None,
                text=str(rng.choice(['yes', 'no', 'No it is']))) for m in ('base', 'stage2') for o in items]
    def rows(table): return sorted(json.dumps(r) for r in table if r['metric'] in ('strict', 'strict_pairs'))
    there, here = rows(score_table(items, log, n_draws=300)), rows(score_answers(items, log, ['strict'], n_draws=300)[0])
    assert there == here and len(there) >= 20


@real
@pytest.mark.parametrize('langs,split', [(['en'], 'test'), (['zh'], 'test zh'), (['en', 'zh'], 'test en+zh')])
def test_slake_says_which_languages(langs, split, tmp_path, capsys):
    items = [o for o in read_vqa(DATA/'slake', 'test', lang=None) if o['q_lang'] in langs]
    write_jsonl(tmp_path/'a.jsonl', [dict(question_id=o['id'], prompt=o['question'], text=o['answer']) for o in items])
    assert main(['score', str(DATA/'slake/test.json'), str(tmp_path/'a.jsonl'), '--scorer', 'lmms_slake', '--out', str(tmp_path/'s.csv')]) == 0
    said = capsys.readouterr().out
    assert f'{len(items)} of {len(items)} slake {split} items paired by id' in said and len(items) in (1061, 1033, 2094)
    assert re.search(r'lmms_slake.accuracy +100.00%', said)


def test_odd_line_separators_are_text(tmp_path):
    (tmp_path/'a.jsonl').write_text(json.dumps(dict(prompt='a', text='x\u2028y\x85z'), ensure_ascii=False) + '\r\n', encoding='utf-8', newline='')
    assert read_answers(tmp_path/'a.jsonl')[0]['text'] == 'x\u2028y\x85z'


def test_captions_are_named_and_not_scored():
    items = [item('yes')]
    answer = dict(model='m', dataset='d', split='test', condition='image', item='q0', prompt='What about 0?', text='yes')
    caption = dict(answer, model='n', item='caption:0.png', prompt='Describe.')
    rows, notes = score_answers(items, [answer, caption, dict(caption, model='m')], ['strict'], n_draws=9)
    assert {r['model'] for r in rows} == {'m'}
    assert notes[1].startswith('n, image: ') and '1 captions, not answers' in notes[1] and notes[1].endswith('not scored')
    assert next(r['value'] for r in rows if r['metric'] == 'answers.caption') == 1


def test_a_scorer_of_a_recipe_joins_the_tables():
    @SCORERS.register('length')
    def length(item, text): return {'words': float(len(text.split()))}
    try: rows, _ = score_answers([item('yes')], [dict(prompt=item('yes')['question'], text='yes it is')], model='m', n_draws=50)
    finally: del SCORERS['length']
    assert [r['value'] for r in rows if (r['metric'], r['slice']) == ('length.words', 'all')] == [3]
    with pytest.raises(UnknownName, match="no scorer named 'length'. Known"): score_answers([item('yes')], [dict(prompt=item('yes')['question'], text='yes')], ['length'])


@pytest.mark.parametrize('question, key, said, right', [('Is it CT or MRI?', 'CT', 'not CT', False), ('Left or right lung?', 'left', 'It is not on the left', False),
    ('Is it CT or MRI?', 'CT', 'this is a CT', True), ('Which side?', 'left', 'left, not right', True), ('Which?', 'not enlarged', 'it is not enlarged', True),
    ('Which?', 'mass', 'no evidence of a mass', False)])
def test_a_closed_key_that_is_denied_is_not_said(question, key, said, right):
    assert strict_scores(dict(id='1', question=question, answer=key, answer_type='CLOSED', options=[]), said)['closed'] == right
