"Labels as captions and conversations: nothing of a held-out image, nothing that the labels do not say."
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from llava_med.core.runs import read_json
from llava_med.data.conversations import fault
from llava_med.data.labels import (absent_things, held_out_images, knowledge, label_records, label_set,
                                   place_words, slake_labels, vqa_rad_labels)
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
