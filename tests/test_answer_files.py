"Answers of any tool belong to the questions that they answer, or to none."
import csv
import json
import random
import time
from collections import Counter

import openpyxl
import pytest

from llava_med.core.runs import write_json, write_jsonl
from llava_med.data.vqa_readers import read_vqa
from llava_med.evaluate.answer_files import read_answers, read_rows
from llava_med.evaluate.pairing import CASES, align, one_answer_each, questions_in, remedy
from llava_med.evaluate.exact import ScoreError
from llava_med.evaluate.score_rows import score_answers, score_files


def item(i, question, answer='yes', **kw):
    return dict(id=f'q{i}', images=[f'ct/{i}.png'], question=question, answer=answer, row=i) | kw


# Three sets, each as its own kind of file

def rad_like(folder):
    rows = [dict(qid=40 + 3*i, image_name=f'synpic{i//2}.jpg', image_organ='CHEST', question=f'Is finding {i} here?' if i % 2 else f'Which organ is {i}?',
                 answer=('Yes', 'No')[i % 3 % 2] if i % 2 else f'organ {i % 5}', answer_type='CLOSED' if i % 2 else 'OPEN', question_type='PRES',
                 phrase_type='freeform') for i in range(24)]
    write_json(folder/'testset.json', rows)
    return folder/'testset.json'


def table(path, names, rows):
    with open(path, 'w', newline='', encoding='utf-8') as f:
        w = csv.writer(f)
        w.writerows([names, *rows])
    return path


def choices(folder):
    rows = [[i, f'PMC{i}_F1.jpg', 'c', f'What is {i}?', f'A:CT {i}', f'B:MRI {i}', 'C:X-ray', 'D:PET', 'AB'[i % 2], 'test'] for i in range(12)]
    return table(folder/'test_2.csv', ['index', 'Figure_path', 'Caption', 'Question', 'Choice A', 'Choice B', 'Choice C', 'Choice D', 'Answer', 'split'], rows)


def one_question(folder):
    rows = [[100 + i, f'{i}.png', 'Which disease is shown?', ['mass', 'no finding', 'effusion', 'nodule', 'edema'][i % 5]] for i in range(30)]
    return table(folder/'q.csv', ['question_id', 'image', 'question', 'answer'], rows)


# The same answers as nine tools write them

def own_id(o): return o.get('qid', o['id'])


def ours(p, said):
    write_jsonl(p/'m.jsonl', [dict(model='m', item=o['id'], prompt=o['question'], text=t, error=None) for o, t in said])
    return p/'m.jsonl'


def llava(p, said):
    write_jsonl(p/'m.jsonl', [dict(question_id=own_id(o), prompt=o['question'], text=t, answer_id=f'x{i}', model_id='/data/m', metadata={})
                              for i, (o, t) in enumerate(said)])
    return p/'m.jsonl'


def csv_file(p, said):
    return table(p/'m.csv', ['Question ID', 'Image', 'Question', 'Model Answer'], [[own_id(o), o['images'][0], o['question'], t] for o, t in said])


def lmms(p, said):
    write_jsonl(p/'m.jsonl', [dict(doc_id=o['row'] if 'row' in o else i, target=o['answer'], input=f"{o['question']}\nAnswer the question using a single word or phrase.",
                                   filtered_resps=t, doc_hash='h', accuracy=1.) for i, (o, t) in enumerate(said)])
    return p/'m.jsonl'


def lmms_old(p, said):
    write_jsonl(p/'m.jsonl', [dict(doc_id=i, doc=dict(question=o['question'], answer=o['answer']), target=o['answer'], arguments=[[o['question'], {}]],
                                   resps=[[t]], filtered_resps=[t]) for i, (o, t) in enumerate(said)])
    return p/'m.jsonl'


def vlmeval(p, said):
    book = openpyxl.Workbook()
    book.active.append(['index', 'question', 'answer', 'A', 'B', 'C', 'D', 'prediction'])
    for i, (o, t) in enumerate(said):
        options = [*o['options'], None, None, None, None][:4]
        key = 'ABCD'[options.index(o['answer'])] if o['options'] else o['answer']
        book.active.append([own_id(o), o['question'], key, *options, t])
    book.save(p/'m.xlsx')
    return p/'m.xlsx'


def medevalkit(p, said):
    write_json(p/'m.json', [dict(question=o['question'], answer=o['answer'], answer_type=o['answer_type'], response=t, correct=True, metrics=dict(em=1)) for o, t in said])
    return p/'m.json'


def swift(p, said):
    write_jsonl(p/'m.jsonl', [dict(response=t, labels=o['answer'], logprobs=None, images=[dict(bytes=None, path='/data/' + o['images'][0])],
                                   messages=[dict(role='system', content='s'), dict(role='user', content='<image>' + o['question']), dict(role='assistant', content=t)])
                              for o, t in said])
    return p/'m.jsonl'


def batch(p, said, body=None):
    body = body or (lambda t: dict(model='m', choices=[dict(index=0, message=dict(role='assistant', content=t, reasoning_content=None), finish_reason='stop')]))
    write_jsonl(p/'m.jsonl', [dict(id=f'vllm-{i}', custom_id=o['id'], response=dict(status_code=200, request_id='r', body=body(t)), error=None)
                              for i, (o, t) in enumerate(said)])
    return p/'m.jsonl'


def openai(p, said):
    return batch(p, said[::-1], lambda t: dict(model='gpt', choices=[dict(message=dict(content=[dict(type='text', text=t)]))], usage={}))


@pytest.mark.parametrize('make', [rad_like, choices, one_question])
def test_nine_files_one_score(make, tmp_path):
    path = make(tmp_path)
    items = read_vqa(path, part=True)
    rng = random.Random(0)
    said = [(o, rng.choice([o['answer'], 'no', f"<think>or not</think> {o['answer']}", 'a mass'])) for o in items]
    tables = {}
    for write in (ours, llava, csv_file, lmms, lmms_old, vlmeval, medevalkit, swift, batch, openai):
        folder = tmp_path/write.__name__
        folder.mkdir()
        assert score_files(path, write(folder, said), out=folder/'scores.csv', part=True, n_draws=50) == 0
        tables[write.__name__] = (folder/'scores.csv').read_text()
    assert len(set(tables.values())) == 1, [k for k, v in tables.items() if v != tables['ours']]
    assert 'answers.thoughts' in tables['ours']


# Pairing

def test_order_alone_is_no_proof():
    items = [item(i, 'Which disease?', f'd{i}') for i in range(8)]
    rows = [dict(prompt='Which disease?', text=o['answer']) for o in items]
    for said in (rows, rows[::-1], rows[1:]):
        found, rule, n = align(items, said)
        assert not found and n['ambiguous'] == len(said)
        with pytest.raises(ScoreError, match="cannot be told apart.*write each item's own id"): score_answers(items, said, ['strict'])


@pytest.mark.parametrize('first', [0, 1])
@pytest.mark.parametrize('drop', [None, 0, 3, 7])
def test_row_numbers_of_a_shared_question_prove_nothing(first, drop):
    items = [item(i, 'Which disease?', f'd{i}') for i in range(8)]
    rows = [dict(question_id=i + first, prompt='Which disease?', text='x', true=o['id']) for i, o in enumerate(items) if i != drop]
    for said in (rows, [{k: v for k, v in r.items() if k != 'prompt'} for r in rows]): assert not align(items, said)[0]


def test_the_sets_own_numbers_count_from_one():
    items = [item(i, 'Which disease?', f'd{i}', qid=str(i + 1)) for i in range(8)]
    found, rule, n = align(items, [dict(question_id=i + 1, prompt='Which disease?', text=f'd{i}') for i in range(7)])
    assert all(r['text'] == f"d{k[1:]}" for k, r in found.items()) and (len(found), n['missing'], rule) == (7, 1, 'by id, the questions agree')
    zero = [item(i, 'Which disease?', f'd{i}', qid=str(i)) for i in range(8)]
    assert not align(zero, [dict(question_id=i + 1, prompt='Which disease?', text='x') for i in range(7)])[0]     # from 0 against from 1


def test_ids_alone():
    items = [item(i, f'Q{i}?', qid=i) for i in range(3)]
    found, rule, _ = align(items, [dict(question_id=i, text=f't{i}') for i in range(3)])
    assert rule == 'by id alone' and [found[f'q{i}']['text'] for i in range(3)] == ['t0', 't1', 't2']
    for numbers in ([1, 2], [1, 2, 3], [0, 1]):
        found, _, n = align(items, [dict(question_id=i, text='x') for i in numbers])
        assert not found and 'add the question' in remedy(n)
    assert len(align(items, [dict(question_id='q2', text='x')])[0]) == 1           # an id with letters is no row number


def test_ids_in_any_writing():
    items = [item(i, 'Which?', qid=q) for i, q in enumerate(['007', 8, 9.0, '123456789012345678901'])]
    found, *_ = align(items, [dict(question_id=v, prompt='Which?', text=str(i)) for i, v in enumerate([7, '8', 9, 123456789012345678901])])
    assert [found[f'q{i}']['text'] for i in range(4)] == list('0123')
    both = [item(0, 'Which?', qid='007'), item(1, 'Which?', qid='7')]
    assert align(both, [dict(question_id='7', prompt='Which?', text='x'), dict(question_id='007', prompt='Which?', text='y')])[0]['q1']['text'] == 'x'


def test_images_decide_by_their_names():
    items = [item(i, 'Which?', images=[f'xmlab{i}/source.jpg']) for i in range(4)]
    found, rule, _ = align(items, [dict(prompt='Which?', image=f'/data/imgs/xmlab{i}/source.png', text=str(i)) for i in (2, 0, 3)])
    assert {k: r['text'] for k, r in found.items()} == dict(q2='2', q0='0', q3='3') and rule == 'by image and question'
    assert align(items, [dict(prompt='Which?', image='source.jpg', text='x')])[2]['ambiguous'] == 1
    flat = [item(i, 'Which?', images=[f'a/{i}.png']) for i in range(3)]
    assert sorted(align(flat, [dict(prompt='Which?', image=[f'b/{i}.jpg'], text='x') for i in (0, 2)])[0]) == ['q0', 'q2']
    assert align(flat, [dict(prompt='Which?', image='b/1.png', text='x'), dict(prompt='Which?', image='b/9.png', text='x')])[2]['extra'] == 1


def test_a_question_of_one_item_pairs_by_text_and_others_do_not():
    items = [item(0, 'A?'), item(1, 'B?'), item(2, 'B?')]
    found, rule, n = align(items, [dict(question_id=7 + i, prompt=q, text='x') for i, q in enumerate(('A?', 'B?', 'B?'))])
    assert list(found) == ['q0'] and rule == 'by question text' and n['ambiguous'] == 2
    wrong = [dict(item=f'q{(i + 1) % 3}', prompt=q, text='x') for i, q in enumerate(('A?', 'B?', 'B?'))]
    found, rule, n = align(items, wrong)
    assert list(found) == ['q0'] and n['other_id'] == 2


def test_two_answers_that_differ_count_for_nothing():
    items = [item(i, f'Q{i}?') for i in range(4)]
    rows = [dict(question_id=f'q{i}', prompt=f'Q{i}?', text='yes') for i in range(4)]
    found, _, n = align(items, rows + [dict(rows[0], text='no'), rows[1]])
    assert sorted(found) == ['q1', 'q2', 'q3'] and (n['conflict'], n['duplicate']) == (2, 1)
    found, _, n = align(items, [{k: v for k, v in r.items() if k != 'question_id'} for r in rows + [dict(rows[0], text='no')]])
    assert sorted(found) == ['q1', 'q2', 'q3'] and n['conflict'] == 2
    n = Counter()
    assert one_answer_each([('a', dict(text=None, error='x')), ('a', dict(text='y'))], n) == dict(a=dict(text='y')) and n['repeated'] == 1


def test_the_files_own_key_is_held_against_the_items():
    items = [item(i, f'Q{i}?', 'yes') for i in range(4)]
    rows = [dict(prompt=f'Q{i}?', text='yes', key='no' if i == 2 else 'Yes.') for i in range(4)]
    assert align(items, rows)[2]['other_key'] == 1
    out, notes = score_answers(items, rows, ['strict'], n_draws=9)
    assert '1 answers whose file has another key' in notes[0]


def trial(rng):
    "A set and a file of answers to it, each with the item that it was given to."
    n, shared = rng.randrange(2, 40), rng.choice([1, 2, 3, 10, 99])
    items = [item(i, f'What is {i//shared}?' if n % 2 else f'What is {i % max(1, n//shared)}?', rng.choice('abc')) for i in range(n)]
    if rng.random() < .3:
        for i, o in enumerate(items): o['qid'] = f'case-{i}'
    order = rng.sample(range(n), n) if rng.random() < .5 else list(range(n))
    keep = rng.choice([1, .9, .5])
    order = [i for i in order if rng.random() < keep] or [0]
    number = rng.choice([lambda k, i: None, lambda k, i: i, lambda k, i: i + 1, lambda k, i: k, lambda k, i: k + 1, lambda k, i: items[i].get('qid')])
    prompt, image = rng.random() < .8, rng.random() < .2
    rows = [dict(text='x', true=items[i]['id'], question_id=number(k, i), prompt=items[i]['question'] if prompt else None,
                 image=f'/data/{i}.jpg' if image else None) for k, i in enumerate(order)]
    return items, rows


def test_no_random_file_is_paired_wrongly():
    rng, pairs = random.Random(3), 0
    for _ in range(1500):
        items, rows = trial(rng)
        found, _, n = align(items, rows)
        assert all(r['true'] == k for k, r in found.items()), rows
        assert len(found) + sum(n[k] for k in ('extra', 'ambiguous', 'no_prompt', 'conflict', 'duplicate')) == len(rows)
        assert len(found) + n['missing'] == len(items)
        pairs += len(found)
    assert pairs > 8000


# Files

def test_two_models_in_one_file(tmp_path):
    items = [item(i, f'Q{i}?', 'yes') for i in range(3)]
    write_jsonl(tmp_path/'a.jsonl', [dict(question_id=i, prompt=f'Q{i}?', text=t, model_id=f'/runs/{m}') for m, t in (('a', 'yes'), ('b', 'banana')) for i in range(3)])
    rows, _ = score_answers(items, read_answers(tmp_path/'a.jsonl'), ['strict'], n_draws=9)
    assert {r['model']: r['value'] for r in rows if r['metric'] == 'strict' and r['slice'] == 'all'} == dict(a=1, b=0)


@pytest.mark.parametrize('record,words', [
    (dict(question='Q?', answer='a'), ['only question, answer', '"answer" may be the key']), (dict(foo='a', bar=1), ['only foo, bar', '"prompt" and "text"']),
    (dict(question='Q?', response='a', output='b'), ["'response' and 'output' may both hold the answer"]),
    (dict(doc_id=0, resps=[[[-3., False]]], filtered_resps=[[-3., False]]), ['log-likelihoods'])])
def test_unknown_files_are_refused_with_the_keys(record, words, tmp_path):
    write_jsonl(tmp_path/'a.jsonl', [record])
    with pytest.raises(ScoreError) as e: read_answers(tmp_path/'a.jsonl')
    assert 'a.jsonl, record 1' in str(e.value) and all(w in str(e.value) for w in words)


def test_objects_tables_and_failures(tmp_path):
    record = dict(question_id=0, prompt='Q?', text='Yes')
    for found in (dict(model='m', results=[record]), {'0': record}, dict(samples=dict(task=[record])), dict(results={'0': record}), [record], record):
        write_json(tmp_path/'a.json', found)
        assert read_answers(tmp_path/'a.json')[0]['text'] == 'Yes'
    write_json(tmp_path/'a.json', dict(a='yes', b='no'))
    assert [(r['id'], r['text']) for r in read_answers(tmp_path/'a.json')] == [('a', 'yes'), ('b', 'no')]
    (tmp_path/'a.tsv').write_text('index\tquestion\tprediction\n007\tQ?\tNA\n', encoding='utf-8')
    assert {k: v for k, v in read_answers(tmp_path/'a.tsv')[0].items() if k in ('id', 'text')} == dict(id='007', text='NA')
    (tmp_path/'a.csv').write_text('id,text\n1,a,b\n')
    with pytest.raises(ScoreError, match='row 1: has more cells'): read_rows(tmp_path/'a.csv')
    (tmp_path/'a.xlsx').write_text('no')
    with pytest.raises(ScoreError, match='a.xlsx: not an Excel file'): read_rows(tmp_path/'a.xlsx')
    write_jsonl(tmp_path/'a.jsonl', [dict(question='Q?', prediction='Failed to obtain answer via API.'),
                                     dict(question='R?', prediction='a')])
    assert [bool(r.get('error')) for r in read_answers(tmp_path/'a.jsonl')] == [True, False]
    write_jsonl(tmp_path/'a.jsonl', [dict(custom_id='q', response=None, error=dict(code='timeout')), dict(custom_id='r', response=dict(status_code=400, body=dict(error=dict(message='x'))), error=None)])
    assert all(r['error'] for r in read_answers(tmp_path/'a.jsonl'))
    cut_off = dict(custom_id='r', response=dict(status_code=200, body=dict(choices=[dict(message=dict(content=None, reasoning_content='hm'))])), error=None)
    write_jsonl(tmp_path/'a.jsonl', [cut_off, dict(custom_id='s', response='yes')])
    assert [(r.get('error'), r['text']) for r in read_answers(tmp_path/'a.jsonl')] == [(None, None), (None, 'yes')]


def test_a_file_of_questions_is_noticed():
    items = [item(i, f'Q{i}?') for i in range(4)]
    assert align(items, [dict(question_id=f'q{i}', image=f'{i}.png', text=f'Q{i}?') for i in range(4)])[2]['echo'] == 4


def test_ten_thousand_answers_to_one_question():
    items = [item(i, 'Which disease?', f'd{i % 50}') for i in range(10_000)]
    rows = [dict(prompt='Which disease?', text='x', key=o['answer'], image=o['images'][0] if i % 2 else None) for i, o in enumerate(items)]
    start = time.process_time()
    found, _, n = align(items, rows)
    assert time.process_time() - start < 10 and all(k == f'q{i}' for i, k in enumerate(found))


def test_questions_in_prompts():
    for prompt in ('Is it red?', '<image>\nIs it red?', 'USER: Is it red?', 'Question: Is it red?\nA. yes\nB. no\nAnswer with the letter.',
                   'Is it red? Please choose from the following two options: [yes, no]', '<|im_start|>Is it red?\nAnswer the question using a single word.'):
        assert 'is it red' in questions_in(prompt), prompt
    assert set(CASES) >= {'missing', 'extra', 'ambiguous', 'conflict', 'other_key', 'thoughts', 'control'}


def test_a_split_is_chosen_only_where_it_is_proven():
    "Questions of two splits: the answers of one are never given to the other."
    items = [item(0, 'A?', 'x', split='train', id='t0'), item(1, 'B?', 'y', split='train', id='t1'), item(0, 'A?', 'u', split='test', id='e0'),
             item(1, 'B?', 'v', split='test', id='e1'), item(2, 'C?', 'w', split='test', id='e2')]
    rows = [dict(prompt=q, text=t) for q, t in (('A?', 'x'), ('B?', 'y'))]
    with pytest.raises(ScoreError, match='cannot be told apart'): score_answers(items, rows, ['strict'], n_draws=9)
    many = [item(i, f'Q{i}?', 'x', split='test', id=f'e{i}') for i in range(40)] + [item(i, f'Q{i + 30}?', 'y', split='train', id=f't{i}') for i in range(40)]
    out, notes = score_answers(many, [dict(prompt=f'Q{i}?', text='x') for i in range(40)], ['strict'], n_draws=9)
    assert '40 of 40 x test items'.replace('x', 'all') in notes[0] and next(r['value'] for r in out if r['metric'] == 'strict') == 1


# What other people's files hold beside answers

FOUR = [item(i, f'Which organ is number {i}?', a) for i, a in enumerate(('liver', 'spleen', 'lung', 'skin'))]


def score(items, path):
    rows, notes = score_answers(items, read_answers(path), ['strict'], n_draws=20)
    return {r['model']: r['value'] for r in rows if (r['slice'], r['metric']) == ('all', 'strict')}, ' '.join(notes)


def batch_line(o, text, **body):
    choices = [dict(index=k, message=dict(role='assistant', content=t)) for k, t in enumerate([text] if isinstance(text, str) else text)]
    return dict(custom_id=o['id'], error=None, response=dict(status_code=200, body=dict(model='org/m', choices=choices) | body))


@pytest.mark.parametrize('failed', [dict(response=None, error=dict(code='x')), dict(response=dict(status_code=500, body=dict(error=dict(message='x'))))])
def test_failed_rows_of_a_batch_belong_to_its_model(tmp_path, failed):
    rows = [batch_line(o, o['answer']) for o in FOUR]
    write_jsonl(tmp_path/'a.jsonl', [rows[0] | failed, *rows[1:]])
    assert score(FOUR, tmp_path/'a.jsonl')[0] == {'model': .75}
    write_jsonl(tmp_path/'b.jsonl', [rows[0] | failed, *rows[1:], *(batch_line(o, 'zz', model='n') for o in FOUR)])
    with pytest.raises(ScoreError, match="b.jsonl: the failed answer to 'q0' names no model.*one file for each"): read_answers(tmp_path/'b.jsonl')


def test_several_samples_are_counted(tmp_path):
    write_jsonl(tmp_path/'a.jsonl', [batch_line(o, [o['answer'], 'zz']) for o in FOUR[:3]] + [batch_line(FOUR[3], ['skin', 'skin'])])
    assert '3 answers with several samples that differ (the first counts)' in score(FOUR, tmp_path/'a.jsonl')[1]
    write_jsonl(tmp_path/'b.jsonl', [dict(doc_id=o['row'], doc=dict(question=o['question']), target=o['answer'], resps=[['zz', o['answer']]],
                                          filtered_resps=[['zz', o['answer']]]) for o in FOUR])
    assert '4 answers with several samples' in score(FOUR, tmp_path/'b.jsonl')[1]


def test_medevalkit_with_messages_and_under_a_name(tmp_path):
    rows = [dict(question=o['question'], answer=o['answer'], response=o['answer'], messages=dict(prompt=o['question'], image='x')) for o in FOUR]
    write_json(tmp_path/'a.json', rows)
    write_json(tmp_path/'b.json', {'VQA_RAD': {'results': rows}})
    assert score(FOUR, tmp_path/'a.json')[0] == score(FOUR, tmp_path/'b.json')[0] == {'model': 1.}


def test_tables_with_two_columns_of_one_name_and_packed_files_are_refused(tmp_path):
    table(tmp_path/'a.csv', ['question', 'prediction', 'prediction'], [[o['question'], 'zz', o['answer']] for o in FOUR])
    book = openpyxl.Workbook()
    book.active.append(['question', 'text', 'text'])
    book.save(tmp_path/'b.xlsx')
    for name in ('a.csv', 'b.xlsx'):
        with pytest.raises(ScoreError, match=f'{name}: has two columns .*keep the one that counts'): read_answers(tmp_path/name)
    for start, said in ((b'PAR1', 'Parquet; write it as'), (b'\x1f\x8b\x08\x00', 'compressed; unpack'), (b'PK\x03\x04', 'compressed; unpack')):
        (tmp_path/'c.json').write_bytes(start)
        with pytest.raises(ScoreError, match=f'c.json: is {said}'): read_answers(tmp_path/'c.json')


@pytest.mark.parametrize('frame', ['<image>\nUSER: {} ASSISTANT:', 'Question: {} Short answer:', 'Q: {}\nA:', 'USER: <image>\n{} ASSISTANT: '])
def test_the_label_of_the_answer_is_no_part_of_a_question(tmp_path, frame):
    write_jsonl(tmp_path/'a.jsonl', [dict(prompt=frame.format(o['question']), text=o['answer']) for o in FOUR])
    assert score(FOUR, tmp_path/'a.jsonl')[0] == {'model': 1.}


def test_options_in_another_order_are_refused(tmp_path):
    items = [o | dict(options=['liver', 'spleen', 'lung', 'skin'], answer_type='CLOSED') for o in FOUR]
    other = ['spleen', 'liver', 'lung', 'skin']
    lines = '\n'.join(f'{l}. {o}' for l, o in zip('ABCD', other))
    beside = dict(zip('ABCD', other))
    for rows in ([dict(prompt=f'{o["question"]}\n{lines}\nAnswer with the letter.', text='ABCD'[other.index(o['answer'])]) for o in items],
                 [beside | dict(question=o['question'], prediction='ABCD'[other.index(o['answer'])]) for o in items]):
        write_jsonl(tmp_path/'a.jsonl', rows)
        with pytest.raises(ScoreError, match="'q0' was asked with its options in another order .spleen; liver.*as they were asked"): score(items, tmp_path/'a.jsonl')
    write_jsonl(tmp_path/'a.jsonl', [beside | dict(question=o['question'], prediction=o['answer']) for o in items])   # texts say the same in any order
    assert score(items, tmp_path/'a.jsonl')[0] == {'model': 1.}


def test_slake_is_paired_by_its_own_question_ids(tmp_path):
    rows = [dict(qid=i, img_name=f'x{i//2}/source.jpg', question='What organ is it?', answer='liver' if i % 3 else 'lung', answer_type='OPEN', q_lang='en',
                 content_type='Organ', modality='CT', location='Lung') for i in range(40, 52)]
    write_json(tmp_path/'test.json', rows)
    write_jsonl(tmp_path/'a.jsonl', [dict(question_id=r['qid'], question=r['question'], response=r['answer']) for r in rows[::-1]])
    assert score(read_vqa(tmp_path/'test.json', part=True), tmp_path/'a.jsonl')[0] == {'model': 1.}


def test_a_question_beside_its_template_pairs_the_answer(tmp_path):
    write_jsonl(tmp_path/'a.jsonl', [dict(prompt=f'Look. {o["question"]} Be brief.', question=o['question'], text=o['answer']) for o in FOUR])
    assert score(FOUR, tmp_path/'a.jsonl')[0] == {'model': 1.}


def test_options_beside_or_in_the_logged_prompt_are_compared_too(tmp_path):
    items = [o | dict(options=['liver', 'spleen', 'lung', 'skin'], answer_type='CLOSED') for o in FOUR]
    for k, own in enumerate((dict(choices=['A. spleen', 'B. liver', 'C. lung', 'D. skin']), dict(options=dict(A='spleen', B='liver', C='lung', D='skin')),
                             dict(prompt='{}\nA. spleen\nB. liver'))):
        write_jsonl(tmp_path/f'{k}.jsonl', [dict(question=o['question'], response='A') | own | ({'prompt': own['prompt'].format(o['question'])} if 'prompt' in own else {})
                                            for o in items])
        with pytest.raises(ScoreError, match='options in another order'): score(items, tmp_path/f'{k}.jsonl')
    write_jsonl(tmp_path/'l.jsonl', [dict(doc_id=o['row'], doc=dict(question=o['question']), input=o['question'] + '\nA. skin\nB. lung\nC. liver\nD. spleen',
                                          target='x', resps=[['A']], filtered_resps=['A']) for o in items])
    with pytest.raises(ScoreError, match='options in another order'): score(items, tmp_path/'l.jsonl')
    write_jsonl(tmp_path/'m.jsonl', [dict(prompt=o['question'] + '\nA. liver\nB. spleen\nC. lung\nD. skin\nE. none of these', text='ABCD'[o['row']]) for o in items])
    assert score(items, tmp_path/'m.jsonl')[0] == {'model': 1.}


def test_a_prompt_with_its_options_in_it_is_the_question(tmp_path):
    asked = [f'Which organ is number {i}? (A) liver (B) spleen' for i in range(4)]
    table(tmp_path/'q.csv', ['image', 'question', 'answer'], [[f'{i}.png', q, 'AB'[i % 2]] for i, q in enumerate(asked)])
    write_jsonl(tmp_path/'a.jsonl', [dict(prompt=q, text='AB'[i % 2]) for i, q in enumerate(asked)])
    assert score(read_vqa(tmp_path/'q.csv'), tmp_path/'a.jsonl')[0] == {'model': 1.}


@pytest.mark.parametrize('row', [dict(custom_id='q0', response=dict(body='{}')), dict(custom_id='q0', response=dict(body=dict(choices=['A']))),
                                 dict(doc_id=0, doc='x', resps=[['A']], filtered_resps=['A'])])
def test_records_that_only_look_like_those_of_a_tool_are_refused_in_words(tmp_path, row):
    write_jsonl(tmp_path/'a.jsonl', [row, row])
    with pytest.raises(ScoreError, match='a.jsonl, record 1: has the keys .* and not what belongs in them; write "prompt"'): read_answers(tmp_path/'a.jsonl')


@pytest.mark.parametrize('word', ['', 'None', 'False', '0', 'nan'])
def test_a_word_for_no_error_is_none(tmp_path, word):
    table(tmp_path/'a.csv', ['question', 'text', 'error'], [[o['question'], o['answer'], word] for o in FOUR])
    assert score(FOUR, tmp_path/'a.csv')[0] == {'model': 1.}


@pytest.mark.parametrize('layout', [lambda rows: dict(results=rows), lambda rows: {r['id']: dict(prompt=r['prompt'], text=r['text']) for r in rows}])
def test_answers_in_an_indented_object_are_read(tmp_path, layout):
    rows = [dict(id=f'a{i}', prompt=f'Is {i} big?', text='no') for i in range(3)]
    (tmp_path/'a.json').write_text(json.dumps(layout(rows), indent=1))
    assert [(r['id'], r['text']) for r in read_answers(tmp_path/'a.json')] == [(f'a{i}', 'no') for i in range(3)]


def test_an_answer_without_a_model_among_others_is_named(tmp_path):
    (tmp_path/'a.json').write_text(json.dumps([dict(id='a', text='no', model='m'), dict(id='b', text='no'), dict(id='c', text='no', model=['m'])]))
    with pytest.raises(ScoreError, match='a.json, record 2: names no model, and others do .2 of 3 name none'): read_answers(tmp_path/'a.json')


def test_a_row_that_was_cut_off_is_named(tmp_path):
    (tmp_path/'a.csv').write_text('id,prompt,text\na,Big?,no\nb,Wide?')
    with pytest.raises(ScoreError, match='a.csv, row 2: has fewer cells'): read_answers(tmp_path/'a.csv')
