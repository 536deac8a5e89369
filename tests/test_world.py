"What the chapters of the world cannot say: many scenes, both layouts, worker processes, real captions."
import csv, json, tarfile
from collections import Counter
import numpy as np, pytest
from lxml import etree
from PIL import Image
from llava_med.world import render as drawing
from llava_med.core.vocabulary import ASK, KINDS, MODALITIES, QUADRANTS, Claims
from llava_med.data.claims import read_claims
from llava_med.world import language as words, scenes, sets
from llava_med.core.runs import test_data as real_data

N = 240
ALL = [scenes.sample_scene(i, split) for split in scenes.SPLITS for i in range(N)]

def test_scenes_are_deterministic_and_patients_disjoint():
    assert scenes.sample_scene(17, 'val') == scenes.sample_scene(17, 'val')
    people = [{s.patient for s in ALL if s.split == split} for split in scenes.SPLITS]
    assert [len(p) for p in people] == [N]*3 and not people[0] & people[1] and not people[2] & (people[0] | people[1])
    a, b = scenes.sample_scene(17, 'train'), scenes.sample_scene(17, 'test')
    assert (scenes.jitter(a) != scenes.jitter(b)).any()

@pytest.mark.parametrize('modality', MODALITIES)
def test_pictures_are_deterministic_varied_and_not_saturated(modality):
    imgs = [drawing.render(scenes.sample_scene(i, 'train', modality)) for i in range(4)]
    again = drawing.render(scenes.sample_scene(2, 'train', modality))
    assert (imgs[2] == again).all() and again.shape == (256, 256, 3) and again.dtype == np.uint8
    for i in range(3): assert np.abs(imgs[i].astype(int)-imgs[3]).mean() > 3
    assert all(((im > 4) & (im < 251)).mean() > .4 for im in imgs)
    assert drawing.render(scenes.sample_scene(2, 'train', modality), 96).shape == (96, 96, 3)

def test_boxes_are_inside_apart_and_on_the_side_that_is_said():
    for s in ALL:
        boxes = [(f, b) for f in s.findings for b in f.boxes]
        for f, (x, y, w, h) in boxes:
            assert 0 <= x < x+w <= 1 and 0 <= y < y+h <= 1
            assert (x+w/2 < .5) == (f.side == 'left')
            assert f.kind in words.WORLD_LABELS and len(f.boxes) == f.count <= KINDS[f.kind].most
            if KINDS[f.kind].most > 1 and f.quadrant:
                assert (y+h < .5) == f.quadrant.startswith('upper') and (y > .5) == f.quadrant.startswith('lower')
        for i, (f, (x, y, w, h)) in enumerate(boxes):
            for g, (x2, y2, w2, h2) in boxes[:i]:
                pleural = {f.kind, g.kind} & {'pleural effusion', 'pneumothorax'}
                far = np.hypot(x+w/2-x2-w2/2, y+h/2-y2-h2/2)
                assert far > (w+w2)/2 or pleural, (s.seed, s.split)

def test_large_is_clearly_larger_than_small():
    sizes = {}
    for s in ALL:
        for f in s.findings:
            if f.kind not in ('pleural effusion', 'pneumothorax'):
                sizes.setdefault((f.kind, f.size), []).extend(b[2] for b in f.boxes)
    for kind in {k for k, _ in sizes}:
        assert min(sizes[kind, 'large']) >= 1.65*max(sizes[kind, 'small'])
        assert min(sizes[kind, 'small'])*96 > 5

def test_unseen_combinations_occur_in_test_only():
    def rare(split): return np.mean([any((f.kind, f.side) in scenes.UNSEEN for f in s.findings)
                                     for s in ALL if s.split == split])
    assert rare('train') == rare('val') == 0 and .03 < rare('test') < .15
    items = [q for s in ALL for q in words.questions(s)]
    assert Counter(q['combination'] for q in items if q['split'] != 'test') == {'seen': sum(q['split'] != 'test' for q in items)}
    assert any(q['combination'] == 'unseen' and q['question_type'] == 'side' for q in items)

def test_texts_are_read_back_exactly():
    for s in ALL:
        truth = words.scene_claims(s)
        for style in ('brief', 'detailed'):
            for draw in range(2):
                caption = words.captions(s, style, draw)
                assert (len(caption.split()) < 30) == (style == 'brief')
                read = read_claims(' '.join([caption, *words.mentions(s, 'Figure 12')]))
                for k in ('modality', 'organ', 'findings', 'absent', 'normal'):
                    assert getattr(read, k) == getattr(truth, k), (k, caption)
                assert read.history in (None, s.history)
                alone = read_claims(caption)
                assert set(alone.findings) == set(truth.findings) and alone.absent <= truth.absent
                for kind, f in alone.findings.items():
                    assert all(v in (None, truth.findings[kind][k]) for k, v in f.items()), caption

@pytest.mark.parametrize('text, present, absent', [
    ('Neither nodule nor effusion.', {}, {'nodule', 'pleural effusion'}),
    ('There is a cavity without any mass.', {'cavity'}, {'mass'}),
    ('Nodule, effusion and pneumothorax are absent.', {}, {'nodule', 'pleural effusion', 'pneumothorax'}),
    ('No pneumothorax, and a small effusion on the left.', {'pleural effusion'}, {'pneumothorax'}),
    ('The tumour was not seen; two haemorrhages are present.', {'hemorrhage'}, {'tumor'}),
    ('Multiple cysts in the uterine cavity', {'cyst'}, set()),
    ('Survival curves of both groups (p < 0.05).', {}, set())])
def test_denials(text, present, absent):
    c = read_claims(text)
    assert (set(c.findings), c.absent) == (set(present), absent)

def test_real_captions_never_break_the_reader():
    data = real_data()
    if data is None or not (data/'rocov2').exists(): pytest.skip('no real captions: set LLAVA_MED_TESTDATA')
    with open(data/'rocov2'/'sample_test_captions.csv', newline='', encoding='utf-8') as f:
        captions = [r['Caption'] for r in csv.DictReader(f)]
    claims = [read_claims(c) for c in captions]
    assert len(claims) >= 30 and any(c.modality == 'ct_scan' for c in claims)
    for t in ('', 'no', 'a '*2000+'nodule', '((', 'Fig. 1A) Ω\u00a0nodule'): read_claims(t)

def test_questions_have_one_right_short_answer():
    items = [q for s in ALL for q in words.questions(s)]
    by_id = {q['id']: q for q in items}; assert len(by_id) == len(items)
    for q in items:
        assert q['answer'] == q['answer'].lower() and '{' not in q['question']
        closed = q['answer'] in ('yes', 'no', 'left', 'right', 'small', 'large')
        assert (q['answer_type'] == 'CLOSED') == closed
        if q['answer'] in ('yes', 'no'):
            twin = by_id[q['twin_of']]
            assert twin['twin_of'] == q['id'] and {q['answer'], twin['answer']} == {'yes', 'no'}
            assert twin['question'] != q['question'] and twin['combination'] == q['combination']
        else: assert q['twin_of'] is None
    answers = {}
    for q in items: assert answers.setdefault((q['patient'], q['question']), q['answer']) == q['answer']
    assert {q['question_type'] for q in items} == set(ASK) == {
        'presence', 'modality', 'organ', 'finding', 'side', 'quadrant', 'count', 'size', 'unanswerable'}

def test_answers_are_balanced_and_skew_is_a_switch():
    scenes = [s for s in ALL if s.split == 'train']
    def share(skew, type_, answer):
        qs = [q['answer'] for s in scenes for q in words.questions(s, skew) if q['question_type'] == type_]
        return qs.count(answer)/len(qs)
    assert share(0, 'presence', 'yes') == .5 and share(.8, 'presence', 'yes') > .7
    assert max(share(0, 'count', str(i)) for i in range(5)) < .35
    assert max(share(0, 'quadrant', q) for q in QUADRANTS) < .35

def read_article(path):
    "XML tree and names of figure files of an article in either layout."
    if path.is_dir(): return etree.parse(str(path/f'{path.name}.xml')), {p.name for p in path.glob('*.jpg')}
    with tarfile.open(path) as tar:
        nxml = next(n for n in tar.getnames() if n.endswith('.nxml'))
        return etree.parse(tar.extractfile(nxml)), {n.split('/')[1] for n in tar.getnames() if n.endswith('.jpg')}

@pytest.mark.parametrize('layout', ['pmc', 'oa_package'])
def test_articles_hold_what_the_truth_says(tmp_path, layout):
    paths = sets.write_articles(tmp_path, 12, seed=3, layout=layout)
    truth = [json.loads(l) for l in (tmp_path/'truth.jsonl').read_text().splitlines()]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([p.name for p in paths]+['truth.jsonl'])
    roles = Counter(r['role'] for r in truth); assert roles['image'] > .85*len(truth)
    for path in paths:
        tree, files = read_article(path); rows = [r for r in truth if path.name.startswith(r['pmcid']+'.')]
        figs = tree.findall('.//fig'); assert len(figs) == len(rows) and 3 <= len(figs) <= 6
        assert tree.findtext('.//article-id[@pub-id-type="pmcid"]') == rows[0]['pmcid']
        assert tree.find('.//license') is not None and tree.findtext('.//pub-date/year')
        for fig, row in zip(figs, rows):
            href = fig.find('graphic').get('{http://www.w3.org/1999/xlink}href')
            assert (fig.get('id'), href) == (row['fig_id'], row['file']) and (href in files) == (row['role'] != 'missing')
            assert tree.findall(f'.//xref[@rid="{fig.get("id")}"]')
            if row['role'] == 'image':
                claims = Claims(**{**row['claims'], 'absent': set(row['claims']['absent'])})
                text = ' '.join(' '.join(p.itertext()) for p in fig.getparent().iter('p'))
                assert read_claims(text).findings == claims.findings

def test_workers_do_not_change_the_files(tmp_path):
    one = sets.write_articles(tmp_path/'one', 4, seed=1); two = sets.write_articles(tmp_path/'two', 4, seed=1, n_workers=2)
    def bytes_of(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    assert [p.name for p in one] == [p.name for p in two]
    assert bytes_of(tmp_path/'one') == bytes_of(tmp_path/'two')
    sets.write_articles(tmp_path/'one', 4, seed=1)  # again: replaced, not doubled
    assert bytes_of(tmp_path/'one') == bytes_of(tmp_path/'two')

def test_vqa_set_is_slake_with_disjoint_patients(tmp_path):
    sizes = sets.write_vqa(tmp_path, 12, 4, 6, seed=2, skew=.5)
    rows = {s: json.loads((tmp_path/f'{f}.json').read_text()) for s, f in
            (('train', 'train'), ('val', 'validate'), ('test', 'test'))}
    assert {s: len(r) for s, r in rows.items()} == sizes
    people = [{q['patient'] for q in r} for r in rows.values()]
    assert not people[0] & people[1] and not people[2] & (people[0] | people[1])
    keys = {'img_id', 'img_name', 'question', 'answer', 'q_lang', 'location', 'modality', 'answer_type',
            'base_type', 'content_type', 'triple', 'qid', 'question_type', 'twin_of', 'patient', 'combination', 'scene_seed'}
    qids = {q['qid'] for r in rows.values() for q in r}
    assert len(qids) == sum(sizes.values())
    for q in [q for r in rows.values() for q in r]:
        folder = (tmp_path/'imgs'/q['img_name']).parent
        scene = scenes.sample_scene(q['scene_seed'], q['scene_split'])
        assert keys <= set(q) and q['twin_of'] in qids | {None}
        assert Image.open(folder/'source.jpg').size == Image.open(folder/'mask.png').size == (256, 256)
        boxes = json.loads((folder/'detection.json').read_text())
        assert [next(iter(b)) for b in boxes] == [f.kind for f in scene.findings for _ in f.boxes]

def test_bad_arguments_are_named():
    for call, word in ((lambda: scenes.sample_scene(1, 'dev'), 'dev'), (lambda: scenes.sample_scene(1, modality='pet'), 'pet'),
                       (lambda: sets.write_articles('x', 1, layout='zip'), 'zip'), (lambda: words.captions(ALL[0], 'long'), 'long')):
        with pytest.raises(ValueError, match=word): call()
