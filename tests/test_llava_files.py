"What the cells of 03c_files cannot say: LLaVA-Med's real files, half a million records, and fetched images under its names."
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_med.data.conversations import DOMAINS, RecordError, fault, read_records, to_messages, write_records
from llava_med.data.llava_files import (Form, ImageFolder, conversation_of, domain_counts,
    figure_of, form_of, llava_caption, llava_question, llava_record, missing_words, place_images,
    read_llava_file, stream_rows, training_records, usual_form, with_images, write_rows)
from llava_med.core.runs import test_data as data_folder

REPO = Path(__file__).resolve().parents[1]
DATA = data_folder() and data_folder()/'llava_med'
real = pytest.mark.skipif(DATA is None or not DATA.is_dir(), reason='LLAVA_MED_TESTDATA holds no folder llava_med')
OFFICIAL = dict(instruct_examples_5=('json', 'conversations', 5), llava_med_eval_qa50_fig_captions=('json', 'captions', 50),
                llava_med_eval_qa50_qa=('jsonl', 'questions', 193), llava_med_eval_qa50_qa_ans_2v_thirdparty=('jsonl', 'judgements', 192),
                llava_med_image_urls_eval_2v=('jsonl', 'urls', 50), **{'llava_med_qa50_instruct_caption_in_text_cleaned-60k-3epoch': ('json', 'answers', 193)},
                **{f'v1_vqarad_answer-file{x}': ('jsonl', 'answers', 451) for x in ('', '-1epoch', '-llava-zeroshot')})
QUESTIONS = 'llava_med_eval_qa50_qa.jsonl'


@real
@pytest.mark.parametrize('name', OFFICIAL)
def test_official_files_are_equal_after_reading_and_writing(name, tmp_path):
    ending, kind, n = OFFICIAL[name]
    path = DATA/f'{name}.{ending}'
    form, rows = form_of(path), list(stream_rows(path))
    assert (form.kind, len(rows)) == (kind, n)
    write_rows(tmp_path/'again', rows, form)
    assert (tmp_path/'again').read_bytes() == path.read_bytes()


@real
def test_modality_counts_of_the_questions():
    rows = list(stream_rows(DATA/QUESTIONS))
    assert domain_counts(rows) == dict(zip(DOMAINS, (37, 38, 44, 34, 40)))
    assert sum(sum(r['domain'].values()) > 1 for r in rows) == 8
    grouped = list(stream_rows(DATA/'llava_med_eval_qa50_fig_captions.json'))
    assert domain_counts(grouped) == {d: sum(r['group'] == d for r in grouped) for d in DOMAINS}


@real
def test_questions_go_through_our_records_and_back(tmp_path):
    rows = list(stream_rows(DATA/QUESTIONS))
    records = list(read_llava_file(DATA/QUESTIONS))
    assert len({r['id'] for r in records}) == 193 and not [r for r in records if fault(r)]
    write_records(tmp_path/'ours.json', records)
    assert [llava_question(r, i) for i, r in enumerate(read_records(tmp_path/'ours.json'))] == rows
    assert [r['tags']['type'] for r in records].count('detailed_description') == 50


@real
def test_captions_go_through_figure_records_and_back():
    for row in stream_rows(DATA/'llava_med_eval_qa50_fig_captions.json'):
        figure, row = figure_of(row), {k: v for k, v in row.items() if k != 'group'}
        back = llava_caption(figure)
        assert back['in_text_mention'] == row['in_text_mention']
        assert back['graphic_ref'] == row['graphic_ref'].split('/', 2)[2] and back['fig_label'] == row['fig_label'].rstrip('.:')
        assert all(back[k] == row[k] for k in ('fig_caption', 'fig_id', 'pair_id', 'pmid', 'domain'))
        for m in figure['mentions']: assert not re.search(r' [),.\]]', m['text'])


@real
def test_instruct_examples_of_somebodys_disk():
    records = list(read_llava_file(DATA/'instruct_examples_5.json'))
    assert [r['image'] for r in records] == [f"{r['id']}.jpg" for r in records]
    assert [r['domain']['ct_scan'] for r in records] == [bool((r.get('domain') or {}).get('ct_scan')) for r in stream_rows(DATA/'instruct_examples_5.json')]
    assert [list(llava_record(r)) for r in records] == [['id', 'image', 'domain', 'conversations']]*5


@real
def test_answers_lose_the_role_and_empty_ones_are_noted():
    path, faults = DATA/'v1_vqarad_answer-file.jsonl', []
    rows, records = list(stream_rows(path)), list(read_llava_file(path, faults))
    assert sum(r['text'].startswith('Human:') for r in rows) > 100
    assert not [r for r in records if re.match('human|assistant', r['conversations'][1]['value'], re.I)]
    empty = [str(r['question_id']) for r in rows if not re.sub(r'^\s*\w+:', '', r['text']).strip()]
    assert len(records) + len(faults) == 451 and {str(f['record']) for f in faults} >= set(empty)


@real
def test_every_image_of_the_questions_is_missing_here(tmp_path):
    records, missing = list(read_llava_file(DATA/QUESTIONS)), []
    Image.new('RGB', (9, 9)).save(tmp_path/records[0]['image'])
    kept = list(with_images(records, tmp_path, missing))
    assert {r['image'] for r in kept} == {records[0]['image']} and len(kept) + len(missing) == 193
    assert missing_words(missing, 193) == f'{len(missing)} of 193 records are left out, because their images are missing: {len(missing)} × there is no such file; the first is {missing[0]["id"]!r}.'


def test_damaged_files_end_in_a_sentence(tmp_path):
    p = tmp_path/'a.json'
    for text, words in (('[{"id": 1, ', 'neither JSON'), ('', 'no record'), ('{"mri": [{"pair_id": "1", "fig_caption": "a"}, ', 'dictionary of lists'),
                        ('[1, 2]', 'no record'), ('{"pair_id": 1, "image_file_path": 2}\n{"a', 'line 2')):
        p.write_text(text)
        with pytest.raises(RecordError, match=f'a.json.*{words}'): form_of(p), list(stream_rows(p))
    with pytest.raises(RecordError, match='does not exist'): form_of(tmp_path/'b.json')


def test_a_bad_row_costs_one_line(tmp_path):
    good = {'id': 'a', 'conversations': [{'from': 'human', 'value': 'Q?'}, {'from': 'gpt', 'value': 'A.'}]}
    bad = [7, {'id': 'b'}, {'id': 'c', 'conversations': [1, 2]}, {'question_id': 3, 'text': 'q', 'gpt4_answer': 'a'}, None]
    write_rows(tmp_path/'x.json', [good, *bad, good], Form('conversations'))
    faults = []
    assert len(list(read_llava_file(tmp_path/'x.json', faults))) == 2
    assert [f['record'] for f in faults] == ['record 2', 'b', 'c', 3, 'record 6'] and all(f['reason'].strip() for f in faults)


def test_letters_of_other_scripts_and_odd_line_ends(tmp_path):
    row = {'id': 'ä\u2028b', 'conversations': [{'from': 'human', 'value': 'Was?\u2029\r\n\x85'}, {'from': 'gpt', 'value': '×100 图'}]}
    for layout in ('list', 'rows', 'lines'):
        for plain in (True, False):
            for indent in (None, 3) if layout == 'list' else (None,):
                form = Form('conversations', layout, indent, plain, '\n')
                write_rows(tmp_path/'x', [row, row], form)
                assert list(stream_rows(tmp_path/'x')) == [row, row] and form_of(tmp_path/'x') == form


def test_nothing_is_written_when_a_row_fails(tmp_path):
    def rows():
        yield {'id': 1}
        raise RuntimeError('gone')
    (tmp_path/'x').write_text('old')
    with pytest.raises(RuntimeError): write_rows(tmp_path/'x', rows(), Form('conversations'))
    assert [p.name for p in tmp_path.iterdir()] == ['x'] and (tmp_path/'x').read_text() == 'old'


def test_images_in_folders_of_folders_are_listed_once(tmp_path, monkeypatch):
    import os
    (tmp_path/'a').mkdir(); Image.new('RGB', (9, 9)).save(tmp_path/'a/1.png')
    asked, scandir = [], os.scandir
    monkeypatch.setattr('llava_med.data.llava_files.os.scandir', lambda p: asked.append(str(p)) or scandir(p))
    missing = []
    kept = list(with_images([dict(id=i, image=f'a/{i % 3}.png') for i in range(300)], tmp_path, missing))
    assert len(kept) == 100 and len(missing) == 200 and len(asked) == 1
    (tmp_path/'a/2.png').mkdir()
    assert ImageFolder(tmp_path).why_not('a/2.png') == 'it is no file'


def test_fetched_images_get_their_names(tmp_path):
    "From the addresses to the names that LLaVA-Med's records use, over a bucket on this machine."
    from llava_med.data.articles import read_articles
    from llava_med.data.llava_files import llava_url
    from llava_med.core.testing import LocalBucket
    from llava_med.data.pubmed import get_pmc
    from llava_med.world.sets import write_articles
    write_articles(tmp_path/'phantoms', 2, per_article=(2, 3))
    (tmp_path/'phantoms/truth.jsonl').unlink()
    figures = [f for f in read_articles([tmp_path/'phantoms']) if f['image']]
    gone = llava_url(figures[0]) | {'image_file_path': 'PMC5/none.jpg', 'pair_id': '5_F1'}
    write_rows(tmp_path/'urls.jsonl', [*map(llava_url, figures), gone], Form('urls', 'lines', end='\n'))
    with LocalBucket(tmp_path/'phantoms') as bucket:
        assert get_pmc(out=tmp_path/'pmc', image_urls=tmp_path/'urls.jsonl', base=bucket.url, say=lambda s: None) == 0
    missing = place_images(tmp_path/'pmc', tmp_path/'images')
    assert [m['id'] for m in missing] == ['5_F1']
    assert {p.name for p in (tmp_path/'images').iterdir()} == {f"{f['pmid']}_{f['fig_id']}.jpg" for f in figures}
    for f in figures: assert (tmp_path/'images'/f"{f['pmid']}_{f['fig_id']}.jpg").read_bytes() == Path(f['image']).read_bytes()


HALF_A_MILLION = '''
import json, sys, time
from llava_med.data.llava_files import Form, read_llava_file, write_rows
from llava_med.core.runs import peak_memory_mib
path, n = sys.argv[1], int(sys.argv[2])
caption = 'Axial computed tomography image with a hypodense lesion of the left hepatic lobe and the vessels around it, as the text describes. '
def rows():
    for i in range(n):
        yield {'id': f'{i}_F1', 'image': f'{i}_F1.jpg', 'conversatons': [{'from': 'human', 'value': 'Describe it.\\n<image>'},
               {'from': 'gpt', 'value': f'{i} ' + caption*4}]}
write_rows(path, rows(), Form('conversations'))
before, start = peak_memory_mib(), time.monotonic()
found = sum(1 for _ in read_llava_file(path))
print(json.dumps(dict(found=found, before=before, peak=peak_memory_mib(), seconds=time.monotonic() - start)))
'''


@pytest.mark.slow
def test_half_a_million_records_are_a_stream(tmp_path):
    path, n = tmp_path/'alignment.json', 500_000
    done = subprocess.run([sys.executable, '-c', HALF_A_MILLION, str(path), str(n)], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert path.stat().st_size > 300e6 and got['found'] == n
    assert got['peak'] < 1000 and got['peak'] - got['before'] < 50, got
    print(got)


ORGAN = [{'from': 'human', 'value': '<image>\nWhich organ?'}, {'from': 'gpt', 'value': 'lung'}]
ASKED = [{'role': 'user', 'content': 'Which organ?'}, {'role': 'assistant', 'content': 'lung'}]
PARTS = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'Which organ?'}]}, {'role': 'assistant', 'content': [{'type': 'text', 'text': 'lung'}]}]


def trained(tmp_path, rows, lines=False):
    "What training makes of rows in a file beside three images."
    for i in range(3): Image.new('RGB', (9, 9), (i, 0, 0)).save(tmp_path/f'p{i}.png')
    text = '\n'.join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (tmp_path/'t.json').write_text(text)
    return training_records(tmp_path/'t.json')


@pytest.mark.parametrize('lines', [False, True])
@pytest.mark.parametrize('row', [
    dict(image='p0.png', conversations=ORGAN), dict(messages=ASKED, images=['p0.png']), dict(messages=PARTS, images=['p0.png']),
    dict(images=[{'path': 'p0.png', 'bytes': None}], messages=PARTS), dict(image_path='p0.png', messages=ASKED), dict(image='file://p0.png', conversations=ORGAN),
    dict(messages=[{'role': 'user', 'content': '<image>Which organ?'}, ASKED[1]], images=['p0.png']),
    dict(messages=[{'role': 'user', 'content': [{'type': 'image', 'image': 'p0.png', 'text': None}, PARTS[0]['content'][1]]}, PARTS[1]]),
    dict(conversations=[{'role': 'USER ', 'content': '<image>Which organ?'}, {'role': 'assistant', 'content': 'lung'}], image=['p0.png'])])
def test_conversations_in_the_forms_that_people_have(tmp_path, row, lines):
    found, said = trained(tmp_path, [row], lines)
    assert said == 't.json: All 1 records have their images.' and found[0]['image'] == str(tmp_path/'p0.png')
    assert to_messages(found[0]) == PARTS and found[0]['id'] == 'record_1'


def test_a_system_turn_is_kept_and_said(tmp_path):
    row = dict(id='a', image='p0.png', conversations=[{'from': 'system', 'value': 'You are a radiologist.'}, *ORGAN])
    found, said = trained(tmp_path, [row, row | dict(conversations=ORGAN, id='b'), dict(id='c', system='Be brief.', messages=ASKED, images=['p1.png'])])
    assert [r.get('system') for r in found] == ['You are a radiologist.', None, 'Be brief.'] and '2 have a system turn' in said
    assert to_messages(found[0])[0] == {'role': 'system', 'content': [{'type': 'text', 'text': 'You are a radiologist.'}]}
    assert llava_record(found[0])['conversations'] == row['conversations'] and usual_form(llava_record(found[0]))['system'] == found[0]['system']


@pytest.mark.parametrize('change,why', [
    (dict(video='v.mp4'), 'names a video'), (dict(videos=['v.mp4']), 'names a video'), (dict(audios=['a.wav']), 'names an audio file'),
    (dict(image=None, conversations=[{'from': 'human', 'value': '<video>\nWhat?'}, ORGAN[1]]), 'has <video> in its text'),
    (dict(conversations=[{'from': 'human', 'value': '<image>\nWhere is <ref-object>?'}, {'from': 'gpt', 'value': '<bbox>'}]), 'has <ref-object> in its text'),
    (dict(image=None, conversations=[{'from': 'human', 'value': 'Picture 1: <img>p0.png</img>\nWhat?'}, ORGAN[1]]), 'has <img> in its text'),
    (dict(image=None, conversations=None, messages=[{'role': 'user', 'content': [{'type': 'video', 'video': 'v.mp4'}]}, ASKED[1]]), "has a part of the type 'video'"),
    (dict(conversations=[*ORGAN, {'from': 'system', 'value': 'x'}]), 'has a system turn at place 3'), (dict(conversations=[*ORGAN, {'from': 'tool', 'value': 'x'}]), "has a turn from 'tool'"),
    (dict(conversations=[ORGAN[0], {'from': 'gpt', 'value': True}]), 'is no text at turn 2'), (dict(conversations=[ORGAN[0], {'from': 'gpt', 'value': None}]), 'is empty at turn 2'),
    (dict(conversations=[ORGAN[0], ORGAN[1] | {'weight': 0}]), 'has an answer that is not to be learned (weight: 0)'), (dict(conversations=[ORGAN[0], ORGAN[1] | {'loss': False}]), 'has an answer that is not to be learned'),
    (dict(images=['p1.png']), 'names its images twice'), (dict(image='https://x.org/p0.png'), 'names its image by an address'), (dict(image='data:image/png;base64,AA'), 'holds its image as text'),
    (dict(image=None, images=['p0.png', 'p1.png']), 'names 2 images and has 1 marks'), (dict(image=[{'bytes': 'x'}]), "has an 'image' that is no file name")])
def test_what_no_image_conversation_holds_is_left_out_and_counted(tmp_path, change, why):
    good = dict(id='a', image='p0.png', conversations=ORGAN)
    found, said = trained(tmp_path, [good, good | dict(id='b') | change, good | dict(id='c') | change])
    assert [r['id'] for r in found] == ['a'] and f'2 × {why}' in said and "the first is 'b'" in said and '2 more are left out' in said
    with pytest.raises(RecordError, match='no record can be used'): trained(tmp_path, [good | change])


def test_numbers_are_answers_and_images_keep_their_order(tmp_path):
    number = dict(id='n', image='p0.png', conversations=[{'from': 'human', 'value': '<image>\nHow many?'}, {'from': 'gpt', 'value': 3}])
    several = dict(messages=[{'role': 'user', 'content': 'What changed?'}, {'role': 'assistant', 'content': 0.5}], images=['p2.png', 'p0.png'])
    found, said = trained(tmp_path, [number, several])
    assert [r['conversations'][1]['value'] for r in found] == ['3', '0.5'] and found[1]['image'] == [str(tmp_path/f'p{i}.png') for i in (2, 0)]
    assert [p['type'] for p in to_messages(found[1])[0]['content']] == ['image', 'image', 'text']


def test_one_name_in_two_folders_is_never_the_wrong_image(tmp_path):
    rows = [dict(id=f, image=f'/{f}/p0.png', conversations=ORGAN) for f in ('mri', 'ct')] + [dict(id='x', image='/mri/p1.png', conversations=ORGAN)]
    found, said = trained(tmp_path, rows)
    assert [r['id'] for r in found] == ['x'] and '2 of 3 records are left out, because their images are missing: 2 × images of one name were in several folders' in said
    assert len(trained(tmp_path, [rows[0], rows[0] | dict(id='again')])[0]) == 2


def test_a_file_of_another_form_shows_ours(tmp_path):
    with pytest.raises(RecordError, match=r'begins with the keys q, a: none .*A conversation is written as \{"id"'): trained(tmp_path, [dict(q='Which organ?', a='lung')])


def test_a_name_with_decomposed_letters_or_backslashes_finds_its_file(tmp_path):
    from unicodedata import normalize
    name = normalize('NFD', 'ü') + '.png'
    (tmp_path/'pics').mkdir(); (tmp_path/'pics'/name).write_bytes(b'x')
    record = dict(id='a', image='ü.png', conversations=[{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'It.'}])
    (tmp_path/'t.json').write_text(json.dumps([record], ensure_ascii=False))
    found, said = training_records(tmp_path/'t.json', tmp_path/'pics')
    assert found[0]['image'] == str(tmp_path/'pics'/name) and Path(found[0]['image']).is_file() and said == 't.json: All 1 records have their images.'
    look = ImageFolder(tmp_path)
    assert look.why_not('pics\\ü.png') == '' and look.name('pics\\ü.png') == f'pics/{name}'
    assert look.why_not('pics/u.png').startswith('there is no such file') and look.why_not('../x') == 'its name leads out of the folder'
