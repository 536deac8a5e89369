"The filters on real figures, on many pictures, and with what people get wrong."
import csv
import io
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from llava_med.data import articles as A
from llava_med.data import filters as F
from llava_med.data.images import open_image
from llava_med.world.sets import make_figure, write_articles
from llava_med.world.scenes import sample_scene, scene_rng
from llava_med.core.runs import read_jsonl
from llava_med.core.runs import test_data as data_folder

DATA = data_folder()
real = pytest.mark.skipif(DATA is None or not (DATA/'rocov2').is_dir() or not (DATA/'articles').is_dir(),
                          reason='no real figures in LLAVA_MED_TESTDATA (default ../shared/data)')
# Labelled by eye: compound is what shows several pictures, charts or tables that could stand alone.
LABELS = {r['figure']: r['panels'] == 'compound' for r in csv.DictReader(open(Path(__file__).with_name('figure_panels.csv'), encoding='utf-8'))}


@pytest.fixture(scope='module')
def figures():
    "The labelled figures as records: those of articles, and radiographs cut out of articles."
    captions = pd.read_csv(DATA/'rocov2/sample_test_captions.csv').set_index('ID').Caption
    found = [r for p in A.find_articles([DATA/'articles/packages']) for r in A.read_article(p) if r['image']]
    found += [dict(id=p.stem, image=str(p), caption=captions[p.stem], lang='en', graphics=[p.name], panels=A.count_panels(captions[p.stem]),
                   modalities=A.guess_modalities(captions[p.stem])) for p in sorted((DATA/'rocov2/images').glob('*.jpg'))]
    return found, {r['id']: F.look(r['image']) for r in found}


def role(seed): return ('image', 'compound', 'plot', 'missing')[scene_rng(sample_scene(seed, 'train'), 600).choice(4, p=(.96, .015, .015, .01))]


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    "Phantom figures as records, with more compound figures and plots than usual."
    folder, want, found = tmp_path_factory.mktemp('phantoms'), dict(image=24, compound=10, plot=6), []
    for seed in range(50_000, 60_000):
        kind = role(seed)
        if not want.get(kind): continue
        want[kind] -= 1
        f, path = make_figure(seed, 'train', None, 1), folder/f'{seed}.jpg'
        assert f['role'] == kind
        Image.fromarray(f['img']).save(path, quality=92)
        found.append(dict(id=f'P{seed}', pmcid=f'PMC{seed}', pmid=str(seed), image=str(path), caption=f['caption'], lang='en', licence='CC BY 4.0', graphics=[path.name],
                          modalities=A.guess_modalities(f['caption']), panels=A.count_panels(f['caption']), role=kind))
        if not any(want.values()): return found


# Single panels, measured

def measured(records, looks, truth):
    rules = dict(caption=lambda r: r['panels'] > 1, picture=lambda r: looks[r['id']].gutters > 0)
    rules['both'] = lambda r: rules['caption'](r) or rules['picture'](r)
    return {k: F.precision_recall([f(r) for r in records], truth) for k, f in rules.items()}


@real
def test_single_panel_on_real_figures(figures):
    records, looks = figures
    assert {r['id'] for r in records} == set(LABELS) and len(LABELS) == 64 and sum(LABELS.values()) == 20
    got = measured(records, looks, [LABELS[r['id']] for r in records])
    print('\n', pd.DataFrame(got).T)
    assert got['picture']['recall'] >= .95 and got['picture']['precision'] == 1
    assert got['caption']['recall'] >= .85 and got['caption']['precision'] >= .94
    assert got['both']['recall'] == 1 and got['both']['precision'] >= .95
    assert {r['id'] for r in records if not LABELS[r['id']] and (r['panels'] > 1 or looks[r['id']].gutters)} == {'ROCOv2_2023_test_000408'}  # its caption speaks of (A) and (B)


def test_single_panel_on_phantoms(phantoms):
    looks = {r['id']: F.look(r['image']) for r in phantoms}
    for k, got in measured(phantoms, looks, [r['role'] == 'compound' for r in phantoms]).items(): assert got['precision'] == got['recall'] == 1, k
    kept, dropped, table = F.apply_filters(phantoms)
    assert [r['id'] for r in kept] == [r['id'] for r in phantoms if r['role'] == 'image']
    assert {d['record']: d['filter'] for d in dropped} == {r['id']: 'single_panel' if r['role'] == 'compound' else 'modality' for r in phantoms if r['role'] != 'image'}


def test_gutters_of_drawn_panels():
    def n(*boxes, size=(400, 300), paper=255, **kw):
        im = Image.new('RGB', size, (paper,)*3)
        for b in boxes: im.paste((60, 60, 60), b)
        return F.count_gutters(im, **kw)
    assert [n((0, 0, 195, 300), (200, 0, 400, 300)), n((0, 0, 198, 300), (199, 0, 400, 300))] == [1, 0]     # five pixels, and one pixel
    assert n((0, 0, 190, 300), (210, 0, 400, 300), paper=235) == 0 and n((0, 0, 190, 300), (210, 0, 400, 300), paper=246) == 1
    assert [n((0, 0, 80, 300), (100, 0, 400, 300)), n((0, 0, 110, 300), (130, 0, 400, 300))] == [0, 1]       # a fifth, and more than a quarter
    assert n((0, 0, 400, 300)) == n((100, 100, 300, 200)) == n() == 0


# Copies

@real
def test_copies_of_real_figures(figures):
    records, looks = figures
    seen, wrong = F.SeenImages(), []
    for r in records:
        if seen.find(looks[r['id']]): wrong.append(r['id'])
        seen.add(looks[r['id']], r['id'])
    assert not wrong
    def again(r, scale, quality):
        img, raw = open_image(r['image']), io.BytesIO()
        img.resize((round(img.width*scale), round(img.height*scale)), Image.LANCZOS).save(raw, 'JPEG', quality=quality)
        return F.look(raw.getvalue())
    for scale, quality, part in ((.5, 75, records), (.8, 40, records[::4]), (1.4, 90, records[6:30:4])):
        lost = [r['id'] for r in part if not (seen.find(again(r, scale, quality)) or '').endswith(r['id'])]
        assert not lost, (scale, quality, lost)


def test_copies_equal_those_found_by_comparing_all():
    rng = np.random.default_rng(3)
    base = rng.integers(0, 2, (12, 256))
    xs = []
    for i in range(600):
        b = base[rng.integers(12)].copy(); b[rng.choice(256, rng.integers(0, 24), replace=False)] ^= 1
        grey = np.full((48, 48), 100 + 3*rng.integers(0, 3), np.uint8)
        xs.append(F.Look((9, 9), 0, rng.bytes(8), np.packbits(b).tobytes(), grey.tobytes()))
    def plain(near):
        met, out = [], []
        for x in xs:
            near_ones = [j for j, y in met if (int.from_bytes(x.bits) ^ int.from_bytes(y.bits)).bit_count() <= near
                         and abs(x.thumb[0] - y.thumb[0]) < 4]
            out.append(near_ones[0] if near_ones else None)
            if not near_ones: met.append((len(out) - 1, x))
        return out
    for near in (1, 12, 20):
        seen, out = F.SeenImages(near), []
        for i, x in enumerate(xs):
            why = seen.find(x); out.append(why and int(why.split()[-1]))
            if why is None: seen.add(x, str(i))
        assert out == plain(near) and any(o is not None for o in out)


def test_copies_among_many_pictures_are_found_quickly():
    rng, seen = np.random.default_rng(0), F.SeenImages()
    thumb, n = bytes(2304), 20_000
    bits = np.packbits(np.repeat(rng.integers(0, 2, (n, 64), np.uint8), 4, axis=1), axis=1)   # neighbouring bits agree, as in pictures
    began = time.process_time()
    for i in range(n):
        x = F.Look((9, 9), 0, i.to_bytes(4, 'big'), bits[i].tobytes(), thumb)
        assert seen.find(x) is None
        seen.add(x, str(i))
    assert time.process_time() - began < 20    # 3 seconds on an idle core; comparing all pairs takes minutes
    assert seen.find(F.Look((9, 9), 0, b'?', bits[777].tobytes(), thumb)).endswith(' 777')


def test_copies_can_be_switched_off(phantoms):
    one = next(r for r in phantoms if r['role'] == 'image')
    path = Path(one['image']).with_name('again.jpg')
    open_image(one['image']).resize((180, 180)).save(path, quality=70)
    twice = [one, {**one, 'id': 'again', 'image': str(path)}, {**one, 'id': 'same'}]
    def reasons(**kw): return {d['record']: d['reason'] for d in F.apply_filters(twice, limits=F.Limits(**kw))[1]}
    assert reasons() == {'again': f"nearly the same image as {one['id']}", 'same': f"the same image as {one['id']}"}
    assert reasons(near_bits=0) == {'same': f"the same image as {one['id']}"}


# Licence, language, caption

@pytest.mark.parametrize('licence, any_, nc, free', [
    ('CC BY 4.0', 1, 1, 1), ('CC0 1.0', 1, 1, 1), ('CC BY-SA', 1, 1, 1), ('CC BY-ND 3.0', 1, 1, 1), ('public domain', 1, 1, 1),
    ('CC BY-NC 4.0', 1, 1, 0), ('CC BY-NC-ND', 1, 1, 0), (None, 1, 0, 0), ('', 1, 0, 0), ('All rights reserved', 1, 0, 0), ('CC BYE', 1, 0, 0)])
def test_licence_sets(licence, any_, nc, free):
    assert [F.licence_reason(licence, F.allowed_licences(w)) is None for w in ('any', 'non-commercial', 'commercial')] == [bool(any_), bool(nc), bool(free)]


def test_an_unknown_licence_has_a_reason_of_its_own(phantoms):
    rows = [{**phantoms[0], 'id': i, 'licence': x} for i, x in enumerate((None, 'Copyright 2004 Roe', 'CC BY-NC 4.0', 'CC BY 2.0'))]
    kept, dropped, table = F.apply_filters(rows, ['licence'], F.Limits(licence='commercial'))
    assert [r['id'] for r in kept] == [3] and table == [dict(filter='licence', kept=1, dropped=3)]
    assert len({d['reason'].split(':')[0] for d in dropped}) == 3 and dropped[0]['reason'] == 'no licence is known'
    assert [r['id'] for r in F.apply_filters(rows, ['licence'], F.Limits(licence='CC BY-NC'))[0]] == [2]


@real
def test_language_of_real_captions():
    "No caption is called another language than its article says; most can be told by their words."
    pairs = [(r['lang'], F.guess_language(r['caption'], '??')) for p in A.find_articles([DATA/'articles/xml', DATA/'articles/packages']) for r in A.read_article(p)]
    assert not [p for p in pairs if p[1] not in (p[0], '??')]
    assert sum(b != '??' for _, b in pairs) > .8*len(pairs) and {b for _, b in pairs} >= {'en', 'pt', 'es'}
    rocov = [F.guess_language(t, '??') for f in ('train', 'valid', 'test') for t in pd.read_csv(DATA/f'rocov2/sample_{f}_captions.csv').Caption]
    assert len(rocov) == 800 and set(rocov) == {'en', '??'} and rocov.count('en') > 600


def test_language_and_length(phantoms):
    rows = [{**phantoms[0], 'id': i, 'caption': c} for i, c in enumerate((
        'Radiografia do tórax com um nódulo', 'CT of the chest with a nodule', '胸部CT显示右肺结节', 'CT', ' '.join(['word']*30)))]
    def lost(**kw): return {d['record']: d['filter'] for d in F.apply_filters(rows, ['language', 'caption'], F.Limits(**kw))[1]}
    assert lost() == {3: 'caption'}                                          # Chinese is counted in signs
    assert lost(languages=('en',), max_words=20) == {0: 'language', 2: 'language', 3: 'caption', 4: 'caption'}
    assert lost(languages=('zh', 'pt'), min_words=1) == {1: 'language', 3: 'language', 4: 'language'}


# Evaluation sets

@real
def test_evaluation_questions_name_their_articles():
    held = F.HeldOut([DATA/'llava_med'/'llava_med_eval_qa50_qa.jsonl'])
    rows = read_jsonl(DATA/'llava_med'/'llava_med_eval_qa50_qa.jsonl')
    pmids = {r['pair_id'].split('_')[0] for r in rows}
    assert set(held.articles) == pmids and len(pmids) == len({r['pair_id'] for r in rows}) == 50
    assert len(held.notes) == 1 and '50 of its 50 images are not there' in held.notes[0]
    assert held.reason(dict(pmid=min(pmids)), None) and not held.reason(dict(pmid='1', pmcid=None), None)


@real
def test_evaluation_images_are_found_again(tmp_path):
    "A folder of a VQA set: reduced copies of its pictures must go, others stay."
    sources = sorted((DATA/'slake').rglob('source.jpg'))
    held = F.HeldOut([DATA/'slake'])
    assert held.n_images > len(sources) > 10
    records = []
    for i, p in enumerate([*sources[:5], *sorted((DATA/'rocov2/images').glob('*.jpg'))[:5]]):
        img = open_image(p); img.thumbnail((300, 300)); img.save(tmp_path/f'{i}.jpg', quality=80)
        records.append(dict(id=i, image=str(tmp_path/f'{i}.jpg'), caption='an image of a thing', graphics=[], panels=1))
    kept, dropped, _ = F.apply_filters(records, ['evaluation'], held=held)
    assert [r['id'] for r in kept] == [5, 6, 7, 8, 9] and all('in an evaluation set' in d['reason'] for d in dropped)


def test_evaluation_files_that_are_wrong(tmp_path):
    def said(name, text, error=ValueError):
        (tmp_path/name).write_text(text, encoding='utf-8')
        with pytest.raises(error) as e: F.HeldOut([tmp_path/name])
        assert name in str(e.value)
        return str(e.value)
    assert 'neither JSON' in said('a.json', '[{"image": ')
    assert 'no image and no article id' in said('b.json', '[]')
    assert "'PMCx' is no PMC id" in said('c.txt', 'PMC1\nPMCx')
    assert 'an evaluation set is' in said('d.csv', 'a,b')
    with pytest.raises(FileNotFoundError, match='correct the list'): F.HeldOut([tmp_path/'none'])
    (tmp_path/'e').mkdir(); (tmp_path/'e/broken.jpg').write_bytes(b'x')
    assert 'cannot be compared' in F.HeldOut([tmp_path/'e']).notes[0]


# Modality by picture

def tiny_clip(folder):
    "A tiny random CLIP with its processor, in a folder."
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip import CLIPImageProcessorPil
    torch.manual_seed(0)
    one = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    signs = [c + e for c in 'abcdefghijklmnopqrstuvwxyz0123456789-,' for e in ('', '</w>')]
    vocab = {t: i for i, t in enumerate(['<|startoftext|>', '<|endoftext|>', *signs])}
    model = CLIPModel(CLIPConfig(text_config=dict(**one, vocab_size=len(vocab), max_position_embeddings=60, bos_token_id=0, eos_token_id=1, pad_token_id=1),
                                 vision_config=dict(**one, image_size=64, patch_size=16), projection_dim=32))
    model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessorPil(size={'shortest_edge': 64}, crop_size={'height': 64, 'width': 64}), CLIPTokenizer(vocab=vocab, merges=[])).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def clip(tmp_path_factory): return tiny_clip(tmp_path_factory.mktemp('clip'))


def test_zero_shot_equals_the_plain_path(clip, phantoms):
    "One description a modality: what transformers' own forward pass says."
    import torch
    from transformers import CLIPModel, CLIPProcessor
    prompts, others = dict(mri=('an mri scan',), gross=('a photograph',)), ('a chart', 'a diagram')
    images = [open_image(r['image']) for r in phantoms[:3]]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=[*(p[0] for p in prompts.values()), *others], images=images, padding=True, return_tensors='pt')
    with torch.no_grad(): want = model(**inputs).logits_per_image.softmax(-1)[:, :2]
    got = F.ImageModality(clip, prompts=prompts, others=others)(images)
    assert np.allclose([list(g.values()) for g in got], want.numpy(), atol=2e-4) and list(got[0]) == ['mri', 'gross']
    assert len({round(v, 3) for g in got for v in g.values()}) > 2


def test_modality_from_picture_and_text(clip, phantoms):
    rows = F.image_modalities([*phantoms, {**phantoms[0], 'id': 'none', 'image': None}], F.ImageModality(clip), batch=7)
    assert [r['id'] for r in rows] == [r['id'] for r in phantoms] + ['none'] and rows[-1]['modalities_image'] == {}
    alone = F.image_modalities(phantoms[20:21], F.ImageModality(clip))[0]['modalities_image']
    assert alone == pytest.approx(rows[20]['modalities_image'], abs=2e-4)
    table = F.agreement(rows)
    assert [t['modality'] for t in table] == [*F.PROMPTS, 'same set'] and table[-1]['text'] == len(phantoms)
    said = [{**r, 'modalities': dict(mri=i % 2 == 0), 'modalities_image': dict(mri=.9 if i % 4 < 2 else .1)} for i, r in enumerate(phantoms)]
    assert F.agreement(said)[0] == dict(modality='mri', text=20, image=20, both=10, kappa=0)
    assert F.agreement([{**r, 'modalities_image': {k: .9*v for k, v in r['modalities'].items()}} for r in phantoms])[0]['kappa'] == 1
    sizes = {how: len(F.apply_filters(said, ['modality'], F.Limits(modality_from=how))[0]) for how in ('text', 'image', 'either', 'both')}
    assert sizes == dict(text=20, image=20, either=30, both=10)
    with pytest.raises(ValueError, match='CLIP-type'): F.apply_filters(phantoms, limits=F.Limits(modality_from='image'))
    assert F.agreement([]) == [dict(modality='same set', text=0, image=0, both=0, kappa=None)]


def test_checkpoints_that_are_none(tmp_path, clip):
    with pytest.raises(FileNotFoundError, match='no such folder'): F.ImageModality(tmp_path/'none')
    with pytest.raises(ValueError, match='cannot open the model'): F.ImageModality(tmp_path)
    from transformers import BertConfig, BertModel, CLIPTokenizer
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=80)).save_pretrained(tmp_path/'bert')
    CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path/'bert')
    with pytest.raises(ValueError, match='bert: .*CLIP-type'): F.ImageModality(tmp_path/'bert')


# All together

def test_every_record_has_one_fate(phantoms, tmp_path):
    (tmp_path/'bad.png').write_bytes(b'\x89PNG no'); Image.new('RGB', (40, 300)).save(tmp_path/'thin.png')
    extra = [{**phantoms[0], 'id': 'bad', 'image': str(tmp_path/'bad.png')}, {**phantoms[0], 'id': 'thin', 'image': str(tmp_path/'thin.png')},
             {**phantoms[0], 'id': 'none', 'image': None, 'graphics': ['g1', 'g2']}, {**phantoms[1], 'id': 'twice'}]
    kept, dropped, table = F.apply_filters(phantoms + extra)
    assert len(kept) + len(dropped) == len(phantoms) + 4 and [t['filter'] for t in table] == list(F.FILTERS)
    assert sum(t['dropped'] for t in table) == len(dropped) and table[-1]['kept'] == len(kept)
    fate = {d['record']: (d['filter'], d['reason']) for d in dropped}
    assert fate['none'] == ('image_present', 'no file g1 g2') and fate['thin'] == ('large_enough', '40 x 300 pixels, at least 64 needed')
    assert fate['bad'][0] == 'image_readable' and 'bad.png' in fate['bad'][1] and fate['twice'][0] in ('duplicate', 'single_panel', 'modality')
    assert F.apply_filters(extra[2:3], ['duplicate'])[1] == [dict(record='none', filter='image_present', reason='no file g1 g2')]   # asked for or not
    assert F.apply_filters([]) == ([], [], [dict(filter=f, kept=0, dropped=0) for f in F.FILTERS])


def test_workers_change_nothing(phantoms):
    many = [{**r, 'id': f"{r['id']}-{i}"} for i in range(12) for r in phantoms]     # more than the 400 that are worth processes
    assert F.apply_filters(many, workers=2) == F.apply_filters(many)


def test_wrong_settings_are_one_sentence(phantoms):
    for kw, word in ((dict(modality_from='x'), 'no source of modalities'), (dict(near_bits=99), 'between 0 and 63'), (dict(languages='en'), 'two small letters'),
                     (dict(languages=['english']), 'two small letters'), (dict(licence='free'), "'free' is unknown; known are any, non-commercial, commercial")):
        with pytest.raises(ValueError, match=word): F.Limits(**kw)
    with pytest.raises(ValueError, match="'modalty'; known are licence"): F.apply_filters(phantoms, ['modalty'])
    with pytest.raises(ValueError, match="Record 'q' lacks 'image' and 'caption'"): F.apply_filters([dict(id='q')])


def test_head_and_tail_adds_up(phantoms):
    kept, dropped, _ = F.apply_filters(phantoms)
    rows = F.head_and_tail(phantoms, dropped)
    modality = {r['name']: r for r in rows if r['kind'] == 'modality'}
    for k, r in modality.items():
        if k != 'none named': assert (r['before'], r['single_panel']) == tuple(sum(k in F.record_modalities(x) for x in part) for part in (phantoms, kept))
    assert modality['none named']['before'] == 6 and modality['none named']['modality'] == 0
    finding = [r['before'] for r in rows if r['kind'] == 'finding' and r['name'] != 'none named']
    assert finding == sorted(finding, reverse=True) and list(rows[0]) == ['kind', 'name', 'before', 'modality', 'single_panel']


def test_findings_of_phantoms_are_read_and_denials_are_not(tmp_path):
    write_articles(tmp_path, 12, seed=5)
    records = list(A.read_articles([tmp_path]))
    truth = {(t['pmcid'], t['fig_id']): t for t in read_jsonl(tmp_path/'truth.jsonl')}
    n = wrong = 0
    for r in records:
        claims = truth[r['pmcid'], r['fig_id']]['claims']
        denied = {k for k in claims['absent'] if k in F.FINDING_WORDS} - set(claims['findings'])
        n += len(denied); wrong += len(denied & F.named_findings(r['caption']))
    assert n > 20 and wrong <= .05*n


def test_records_of_an_evaluation_set_that_protect_nothing_are_named(tmp_path):
    Image.new('RGB', (32, 32), 'red').save(tmp_path/'a.png')
    (tmp_path/'e.json').write_text(json.dumps([dict(image='a.png'), dict(picture='b.png'), 5, dict(image='gone.png')]))
    notes = ' '.join(F.HeldOut([tmp_path/'e.json']).notes)
    assert 'e.json: 2 of its 4 records name no image and no article (the first: record 2)' in notes and '1 of its 2 images are not there (the first: gone.png)' in notes
