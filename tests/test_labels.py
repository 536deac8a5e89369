"Labels as captions and conversations: nothing of a held-out image, nothing that the labels do not say."
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from llava_med.core.runs import read_json
from llava_med.data.conversations import fault
from llava_med.data.labels import (absent_things, held_out_images, knowledge, label_records, label_set,
                                   place_words, slake_labels, vqa_rad_labels)
from llava_med.data.vqa import is_slake, slake_boxes, slake_lacks
from llava_med.data.vqa_readers import open_vqa

DATA = Path(os.environ.get('LLAVA_MED_TESTDATA', Path(__file__).parents[1]/'../shared/data'))/'full/slake'
needs_slake = pytest.mark.skipif(not DATA.is_dir(), reason=f'{DATA} is not there: set LLAVA_MED_TESTDATA')


@pytest.fixture(scope='module')
def labels(): return slake_labels(DATA)


@needs_slake
def test_no_label_of_a_held_out_image(labels):
    held = {r['img_name'] for s in ('validate', 'test') for r in read_json(DATA/f'{s}.json')}
    assert held == held_out_images(DATA) and len({r['img_name'] for r in read_json(DATA/'test.json')}) == 180
    assert not {l.image for l in labels} & held and len(labels) == 314


@needs_slake
def test_what_is_said_is_in_the_labels(labels):
    align, talk = label_records(labels, knowledge(DATA), n_rounds=2)
    by_image = {l.image: l for l in labels}
    assert len(align) == 628 and all(fault(r) == '' for r in align + talk)
    answers = Counter()
    for r in talk:
        l, said = by_image[r['image']], [t['value'].replace('<image>\n', '') for t in r['conversations']]
        names = {t.name: t for t in l.things}
        for q, a in zip(said[::2], said[1::2]):
            if m := re.fullmatch(r'(?:Does the picture contain|Is there) (.+?)(?: in this image)?\?', q):
                assert (m[1] in names) == (a == 'Yes'), (r['id'], q, a)
                answers[a] += 1
            if m := re.fullmatch(r'Where is the (.+)\?', q):
                if m[1] in names: assert a in {place_words(t.box).capitalize() for t in l.things if t.name == m[1]}
            if q in ('Is this image normal?', 'Does this image look normal?'):
                assert (a == 'No') == any(t.lesion for t in l.things)
        for g in r['regions']: assert g['name'] in names
    assert .8 < answers['Yes']/answers['No'] < 1.25


@needs_slake
def test_the_set_says_the_same_of_its_own_images(labels):
    "Where a training question of SLAKE asks whether an image is normal, the labels agree."
    lesions = {l.image: any(t.lesion for t in l.things) for l in labels}
    n = 0
    for r in read_json(DATA/'train.json'):
        if r['question'].lower() in ('is this image normal?', 'does this image look normal?') and r['img_name'] in lesions:
            assert (r['answer'] == 'No') == lesions[r['img_name']]
            n += 1
    assert n > 20


@needs_slake
def test_a_no_asks_for_what_others_have(labels):
    kinds = {l.image: (l.modality, l.part) for l in labels}
    there = {}
    for l in labels: there.setdefault(kinds[l.image], set()).update(t.name for t in l.things)
    for image, names in absent_things(labels).items(): assert set(names) <= there[kinds[image]]


@needs_slake
def test_a_set_joins_a_run_with_images_records_and_licence(tmp_path, labels):
    rows, align, talk = label_set(DATA, tmp_path, n_captions=1)
    assert len(rows) == len(align) == len(labels) and {r['licence'] for r in rows + align + talk} == {'CC BY 4.0'}
    assert {r['image'] for r in align + talk} == {r['image'] for r in rows}
    assert len(list((tmp_path/'labels').glob('*.jpg'))) == len(rows) and len({r['id'] for r in align + talk}) == len(align + talk)
    assert sum(r['domain']['chest_xray'] for r in align) == sum(l.modality == 'X-Ray' and l.part == 'chest' for l in labels)


@pytest.mark.skipif(not (DATA.parent/'vqa_rad').is_dir(), reason=f'{DATA.parent/"vqa_rad"} is not there: set LLAVA_MED_TESTDATA')
def test_vqa_rad_lends_no_label_of_a_test_image_and_calls_nothing_normal():
    folder = DATA.parent/'vqa_rad'
    its = open_vqa(folder, say=lambda line: None)
    got = vqa_rad_labels(folder)
    assert not {l.image for l in got} & {n for o in its['test'] for n in o['images']} and len(got) == 111
    assert not any(l.boxed or l.things for l in got)
    _, talk = label_records(got)
    assert {k for r in talk for k in r['tags']['question_types']} <= {'modality', 'position', 'plane'}


# A set that is not whole

def small_set(folder, n=4):
    "A set in SLAKE's layout: n images to learn from, one of validation, one of test, and a knowledge graph."
    for split, names in dict(train=[f'xmlab{i}' for i in range(n)], validate=['xmlab90'], test=['xmlab91']).items():
        rows = [dict(qid=i, img_name=f'{x}/source.jpg', q_lang='en', modality='CT', location='Abdomen', content_type='Organ', answer_type='OPEN',
                     question='Which organ is the largest?', answer='Liver') for i, x in enumerate(names)]
        folder.mkdir(exist_ok=True)
        (folder/f'{split}.json').write_text(json.dumps(rows))
        for x in names:
            (folder/'imgs'/x).mkdir(parents=True)
            Image.new('RGB', (100, 100), (50, 90, 20)).save(folder/'imgs'/x/'source.jpg')
            (folder/'imgs'/x/'detection.json').write_text('[{"Liver": [5, 30, 40, 50]}]')
    (folder/'KG').mkdir()
    for name in ('en_disease', 'en_organ'): (folder/f'KG/{name}.csv').write_text('organ#attribute#value\nLiver#function#making bile\n')
    return folder


def without(*names):
    "A change that removes files or folders."
    import shutil
    def change(d):
        for n in names:
            for p in d.glob(n): shutil.rmtree(p) if p.is_dir() else p.unlink()
    return change


def written(name, data):
    "A change that writes a file, or all that a pattern names."
    def change(d):
        for p in list(d.glob(name)) or [d/name]: p.write_bytes(data)
    return change


def test_a_whole_set_lacks_nothing(tmp_path, capsys):
    d = small_set(tmp_path/'set')
    assert slake_lacks(d) == [] and is_slake(d) and slake_lacks(tmp_path) == []
    rows, align, talk = label_set(d, tmp_path/'out', n_captions=1)
    assert len(rows) == 4 and capsys.readouterr().out == ''
    asked = {a['value'] for r in talk for q, a in zip(r['conversations'][::2], r['conversations'][1::2]) if 'Is there liver' in q['value'] or 'contain liver' in q['value']}
    assert asked == {'Yes'}


@pytest.mark.parametrize('change, lacks, says', [
    (without('imgs'), ['imgs/'], r'set/imgs: there is no such folder; `llava-med get slake`'),
    (without('imgs', 'KG'), ['imgs/'], r'set/imgs: there is no such folder'),
    (without('imgs/*'), ['6 of 6 images (the first: xmlab0/source.jpg)'], 'holds no image of a training question'),
    (without('train.json'), ['train.json'], 'set/train.json: no such file'),
    (without('test.json'), ['test.json'], 'set/test.json: no such file'),
    (without('*.json'), ['train.json', 'validate.json', 'test.json'], 'set/train.json: no such file'),
    (without('*.json', 'imgs'), ['train.json', 'validate.json', 'test.json', 'imgs/'], 'set/train.json: no such file'),
    (written('test.json', b'[]'), ['test.json'], 'set/test.json: holds no list of questions'),
    (written('train.json', b'[{"img_name": "xmlab0/source.jpg", "question": 1}]'), [], "row 0 lacks 'answer'"),
    (written('imgs/xmlab1/source.jpg', b''), [], 'xmlab1/source.jpg: not an image that can be read; fetch it again'),
    (written('imgs/*/source.jpg', b'version https://git-lfs.github.com/spec/v1'), [], 'source.jpg: not an image that can be read'),
    (written('imgs/xmlab1/detection.json', b'[{"Liver": [5, 30]}]'), [], 'xmlab1/detection.json: holds no boxes in the form'),
    (written('imgs/xmlab1/detection.json', b'[{"Liver": '), [], 'xmlab1/detection.json is not valid JSON'),
    (written('KG/en_organ.csv', b'\xff\xfe\x00'), [], 'KG/en_organ.csv: not UTF-8; fetch it again')])
def test_a_broken_set_is_one_sentence_and_leaves_no_record(tmp_path, change, lacks, says):
    d = small_set(tmp_path/'set')
    change(d)
    assert slake_lacks(d) == lacks
    with pytest.raises((ValueError, OSError), match=says) as e: label_set(d, tmp_path/'out')
    assert '\n' not in str(e.value) and str(d) in str(e.value)


def test_missing_images_boxes_and_knowledge_are_counted(tmp_path, capsys):
    "An image without boxes says nothing of what it shows: without them every organ would be absent and every image normal."
    d = small_set(tmp_path/'set')
    without('imgs/xmlab0', 'imgs/xmlab1/detection.json', 'KG')(d)
    assert slake_lacks(d) == ['1 of 6 images (the first: xmlab0/source.jpg)', "1 of 6 images' detection.json (the first: xmlab1/source.jpg)"]
    rows, align, talk = label_set(d, tmp_path/'out')
    said = capsys.readouterr().out
    for words in ('1 of 4 labelled images are missing', '1 of 3 images have no detection.json', 'KG: en_disease.csv and en_organ.csv not there'): assert words in said
    kinds = {k for r in talk if 'xmlab1-' in r['image'] for k in r['tags']['question_types']}
    assert kinds == {'modality', 'position'} and len(rows) == 3


def test_the_images_of_an_evaluation_are_there_or_named(tmp_path):
    d = small_set(tmp_path/'set')
    without('imgs/xmlab91')(d)
    with pytest.raises(FileNotFoundError, match='set: none of the 1 images of its questions is here; name their folder'): open_vqa(d, part=True)
    small_set(tmp_path/'chinese')
    for s in ('train', 'validate', 'test'):
        f = tmp_path/f'chinese/{s}.json'
        f.write_text(f.read_text().replace('"en"', '"zh"'))
    with pytest.raises(ValueError, match="lang='en'; name another"): open_vqa(tmp_path/'chinese', part=True)


def test_a_run_names_what_a_set_lacks_before_anything_runs(tmp_path, monkeypatch, capsys):
    from llava_med.lab.commands import main
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path/'outputs'))
    d = small_set(tmp_path/'set')
    without('imgs/xmlab91')(d)
    (tmp_path/'p.yaml').write_text(f'parameters: {{1_data_prep: {{labels: [{d}]}}, 3b_vqa_tuning: {{vqa: {d}}}}}')
    assert main(['run', str(tmp_path/'p.yaml')]) == 2
    err = capsys.readouterr().err
    assert f'p reads {d}, which lacks 1 of 6 images (the first: xmlab91/source.jpg): fetch it again' in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path/'outputs').exists()
