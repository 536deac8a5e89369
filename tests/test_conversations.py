"What the cells of 03_conversations cannot say: exhaustive leakage, damaged files, LLaVA-Med's own and real articles."
import json
import re
import zlib
from collections import Counter

import numpy as np
import pytest

from llava_med.data import articles
from llava_med.core import runs, vocabulary
from llava_med.data.claims import read_claims
from llava_med.world import language, scenes
from llava_med.data.conversations import (BRIEF_PROMPTS, DETAILED_PROMPTS, IMAGE, RecordError,
    TemplateGenerator, alignment_record, fault, instruct_record, instruct_records, leaks,
    read_records, to_messages, write_records)

N = 500

def texts(seed, split='train'):
    scene = scenes.sample_scene(seed, split)
    return scene, language.captions(scene, ('brief', 'detailed')[seed % 2]), language.mentions(scene)

@pytest.fixture(scope='module')
def talks():
    generator = TemplateGenerator()
    return [(scene, generator(caption, said, np.random.default_rng([1, s])))
            for s in range(N) for scene, caption, said in [texts(s)]]

def short(turns): return [t for t in turns if t.type in vocabulary.ASK]

def names(kind):
    return re.compile('|'.join(rf'\b{re.escape(n)}\b' for name in vocabulary.KINDS[kind].names for n in (vocabulary.plural(name), name)))

def test_no_fact_is_told_before_it_is_asked(talks):
    assert sum(len(turns) for _, turns in talks) > 4*N
    assert [leaks(turns) for _, turns in talks if leaks(turns)] == []

def test_no_answer_is_told_in_words(talks):
    "Independent of the facts that the turns carry: only what is written is read."
    for scene, turns in talks:
        for i, t in enumerate(turns):
            before = ' '.join(f'{e.question} {e.answer}' for e in turns[:i] if e.type != 'unanswerable').lower()
            if t.type in ('modality', 'organ', 'finding'):
                assert not before.strip(), (t, before)
            if t.type == 'presence' and t.kind: assert not names(t.kind).search(before), (t, before)
            about = ' '.join(e.answer for e in turns[:i] if e.kind == t.kind or e.type == 'report')
            if t.type in ('side', 'quadrant', 'description'): assert not re.search(r'left|right|upper|lower', about), (t, before)
            if t.type in ('size', 'description'): assert not re.search(r'small|large', about), (t, before)
            if t.type == 'count' and names(t.kind).search(before):
                assert all(e.type in ('presence', 'finding') for e in turns[:i] if e.kind == t.kind), (t, before)

def test_answers_are_true_and_in_the_vocabulary(talks):
    for scene, turns in talks:
        truth = language.scene_claims(scene)
        for t in short(turns):
            if t.type == 'count':
                assert t.answer == str(truth.findings.get(t.kind, {'count': 0})['count'])
            if t.type in ('side', 'quadrant', 'size') and t.answer not in ('yes', 'no'):
                assert t.answer == truth.findings[t.kind][t.type]
            if t.type == 'modality': assert t.answer == vocabulary.SHORT['modality'][scene.modality]
            if t.type == 'organ': assert t.answer == scene.organ
            if t.type == 'finding': assert t.answer in (*truth.findings, 'none') and (t.answer == 'none') == (not truth.findings)
            if t.type == 'unanswerable': assert t.answer == vocabulary.CANNOT

def test_presence_is_balanced_and_about_stated_kinds(talks):
    answers = [t.answer for _, turns in talks for t in turns if t.type == 'presence']
    assert abs(answers.count('yes')/len(answers) - .5) < .04
    for scene, turns in talks:
        for t in turns:
            if t.kind: assert vocabulary.KINDS[t.kind].modality == scene.modality

def test_every_type_occurs_and_history_never(talks):
    assert {t.type for _, turns in talks for t in turns} == {*vocabulary.ASK, 'description', 'report'}
    for scene, turns in talks:
        assert scene.history not in ' '.join(t.answer for t in turns)

def test_generator_cannot_know_more_than_the_text():
    "Nothing is asked about what the text leaves open, and the same text gives the same conversation."
    caption = 'Chest x-ray with a nodule.'
    for s in range(100):
        turns = TemplateGenerator()(caption, [], np.random.default_rng(s))
        assert all(t.type not in ('side', 'quadrant', 'size', 'description') for t in turns)
        assert {t.kind for t in turns} <= {'nodule', ''}
        assert turns == TemplateGenerator()(caption, [], np.random.default_rng(s))

FIGURE = dict(id='PMC1_f1', pmid='1', caption='Brain MRI without abnormality.', mentions=[], image='PMC1_f1.jpg', lang='en',
              modalities={'mri': True}, licence='CC BY', source='x')
GOOD = dict(id='1_f1', image='1.jpg', conversations=[{'from': 'human', 'value': f'{IMAGE}\nWhich side?'}, {'from': 'gpt', 'value': 'left'}])

def test_records_keep_llava_meds_keys_and_say_who_wrote_them():
    for r in (alignment_record(FIGURE), instruct_record(FIGURE)):
        assert list(r)[:4] == ['id', 'image', 'domain', 'conversations']
        assert {'lang', 'tags', 'regions', 'licence', 'source', 'generator'} <= set(r)
        assert r['domain'] == dict(chest_xray=False, mri=True, histology=False, gross=False, ct_scan=False)
        assert r['generator'].keys() == {'name', 'version', 'saw'} and 'image' not in r['generator']['saw']
        said = json.dumps(r['conversations'])
        assert said.count(IMAGE) == 1 == r['conversations'][0]['value'].count(IMAGE)

@pytest.mark.parametrize('n,options', [(29, BRIEF_PROMPTS), (30, DETAILED_PROMPTS)])
def test_thirty_words(n, options):
    r = alignment_record({**FIGURE, 'caption': ' '.join(['word']*n)})
    assert r['conversations'][0]['value'].replace(IMAGE, '').strip() in options

@pytest.mark.parametrize('change,says', [
    (dict(id=None), "no 'id'"), (dict(conversations=[]), "no list"), (dict(conversations='x'), 'no list'),
    (dict(conversations=GOOD['conversations'][:1]), 'without an answer'),
    (dict(conversations=GOOD['conversations'][::-1]), "from 'human'"),
    (dict(conversations=[GOOD['conversations'][0], {'from': 'gpt', 'value': None}]), "no turn from 'gpt'"),
    (dict(conversations=[GOOD['conversations'][0], {'from': 'gpt'}]), "no turn from 'gpt'"),
    (dict(conversations=[GOOD['conversations'][0], {'from': 'gpt', 'value': ''}]), 'empty'),
    (dict(conversations=[GOOD['conversations'][0], 'left']), "no turn from 'gpt'"),
    (dict(conversations=[{'from': 'human', 'value': 'Which side?'}, GOOD['conversations'][1]]), '0 times'),
    (dict(conversations=[{'from': 'human', 'value': f'{IMAGE}{IMAGE} Which side?'}, GOOD['conversations'][1]]), '2 times'),
    (dict(image=None), "names no 'image'"), (dict(image=['a.jpg', 'b.jpg']), '2 images')])
def test_malformed_records_are_named(tmp_path, change, says):
    path = tmp_path/'records.json'
    path.write_text(json.dumps([GOOD, {**GOOD, 'id': 'second', **change}]))
    with pytest.raises(RecordError, match='records.json: record 2') as e: read_records(path)
    assert says in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(RecordError): write_records(tmp_path/'out.json', [GOOD, {**GOOD, 'id': 'second', **change}])
    assert [p.name for p in tmp_path.iterdir()] == ['records.json']

@pytest.mark.parametrize('text', ['{"id": 1', '[1, 2', 'plain text', '\x00'])
def test_files_that_are_no_json(tmp_path, text):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(RecordError, match='a.json'): read_records(tmp_path/'a.json')

def test_both_spellings_and_unknown_keys(tmp_path):
    old = {('conversatons' if k == 'conversations' else k): v for k, v in GOOD.items()} | {'quality': 3}
    (tmp_path/'a.json').write_text(json.dumps([old]))
    assert read_records(tmp_path/'a.json') == [{**GOOD, 'quality': 3}]
    assert to_messages(old) == to_messages(GOOD)

def test_llava_meds_own_records():
    data = runs.test_data()
    if data is None: pytest.skip('no test data: set LLAVA_MED_TESTDATA')
    records = read_records(data/'llava_med/instruct_examples_5.json')
    assert len(records) == 5 and all(isinstance(r['image'], str) and fault(r) == '' for r in records)
    assert [c['type'] for c in to_messages(records[2])[0]['content']] == ['text', 'image']  # here the image comes last

def test_real_articles():
    data = runs.test_data()
    if data is None: pytest.skip('no test data: set LLAVA_MED_TESTDATA')
    figures = [r for r in articles.read_articles([data/'articles/packages', data/'articles/xml'], lambda *a: None)]
    with_caption = [{**r, 'image': 'x.jpg'} for r in figures if r['caption'].strip()]
    assert len(with_caption) > 100
    for r in with_caption:
        assert fault(alignment_record(r)) == ''
        made = instruct_record(r, generator=TemplateGenerator(read_findings=False))
        if made is None: continue
        assert fault(made) == '' and r['lang'].startswith('en')
        for t, q, a in zip(made['tags']['question_types'], made['conversations'][::2], made['conversations'][1::2]):
            assert t in ('modality', 'report')
            if t == 'report':
                words = re.findall(r'\w+', a['value'].lower())
                assert set(words) <= set(re.findall(r'\w+', r['caption'].lower())), 'nothing is added to the caption'
                assert not re.search(r'year-old|\bfig|arrow', a['value'], re.I)
    made = [instruct_record(r, generator=TemplateGenerator(read_findings=False)) for r in with_caption]
    assert sum(m is not None for m in made) > 50

def prepared():
    "What the cell of the data preparation that checks the generator defines."
    nb = json.loads((runs.root()/'nbs/pipeline/1_data_prep.ipynb').read_text(encoding='utf-8'))
    cell = [s for c in nb['cells'] if 'class Checked(' in (s := ''.join(c['source']))]
    assert len(cell) == 1
    space = dict(TemplateGenerator=TemplateGenerator, leaks=leaks)
    exec(cell[0], space)
    return space['Checked']

def scene_figure(seed):
    _, caption, said = texts(seed)
    return {**FIGURE, 'id': f'PMC{seed}_f1', 'caption': caption, 'mentions': [dict(text=t) for t in said]}

def test_data_preparation_checks_what_it_writes():
    "The checked generator writes the same records as the plain one, and has checked each of them."
    figures, checked = [scene_figure(s) for s in range(40)], prepared()()
    records = list(instruct_records(figures, 0, checked))
    assert records == list(instruct_records(figures, 0, TemplateGenerator()))
    assert checked.checked == len(records) > 30

def test_data_preparation_refuses_a_leak(monkeypatch):
    talk = TemplateGenerator.talk
    def backwards(self, claims, rng): return talk(self, claims, rng)[::-1]
    monkeypatch.setattr(TemplateGenerator, 'talk', backwards)
    with pytest.raises(ValueError, match='given away') as e:
        list(instruct_records([scene_figure(s) for s in range(40)], 0, prepared()()))
    assert '\n' not in str(e.value) and str(e.value).endswith('mend the generator.')


def test_single_questions_are_true_balanced_and_bounded():
    "Each is one turn, its answer never differs from the scene's own questions, and yes and no stay even for each wording."
    generator, tally, seen = TemplateGenerator(weights=dict(sided=6)), Counter(), Counter()
    for s in range(150):
        claims = language.scene_claims(texts(s)[0])
        single = list(instruct_records([scene_figure(s)], 0, generator, 10))[1:]
        assert len(single) <= 10 and len({r['id'] for r in single}) == len(single)
        truth = {(q['question'], q['answer']) for k in range(40) for q in vocabulary.claim_questions(claims, np.random.default_rng(k))}
        for r in single:
            assert len(r['conversations']) == 2 and len(r['tags']['question_types']) == 1
            question, answer = r['conversations'][0]['value'].replace(IMAGE, '').strip(), r['conversations'][1]['value']
            assert not any(q == question and a != answer for q, a in truth), (question, answer)
            tally[answer] += 1; seen[r['tags']['question_types'][0], answer in ('yes', 'no')] += 1
    assert abs(tally['yes'] - tally['no']) < .1*(tally['yes'] + tally['no'])
    assert seen['side', True] > 40 and seen['quadrant', False] > 100
