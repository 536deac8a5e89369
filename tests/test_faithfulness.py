"What deletion, insertion, gates and sanity checks must say about maps whose truth is known."
import numpy as np
import pytest
import torch
from PIL import Image

from llava_med.explain import attention as at
from llava_med.explain import faithfulness as fa
from llava_med.core import runs
from llava_med.models.llava import tiny_model
from llava_med.world.edits import _pixels, edits
from llava_med.world.language import questions
from llava_med.world.scenes import sample_scene
from llava_med.data.vqa import read_slake
from test_maps import asked, picture


@pytest.fixture(scope='module')
def pair(): return tiny_model()


def items(n=30):
    return [dict(o, scene_seed=i, split='val', images=[str(i)], tags=dict(question_type=o['question_type']))
            for i in range(n) for o in questions(sample_scene(i, 'val'))]


def test_edits_change_the_boxes_and_nothing_else():
    seen = set()
    for o in items():
        got = edits(o, 64)
        if got is None: continue
        seen.add(o['question_type'])
        a, b, c = [np.asarray(got[k]).astype(int) for k in ('original', 'edited', 'elsewhere')]
        assert got['answer'] != o['answer'] and (a != b).any()
        assert not ((a != b) & (a != c)).any(), o['question']
        boxes = [box for f in sample_scene(o['scene_seed'], 'val').findings if o['kind'] in (None, f.kind) for box in f.boxes]
        if o['question_type'] in ('presence', 'finding', 'count'):
            assert not (a != b).any(-1)[~_pixels(boxes, 64)].any()
    assert seen == {'presence', 'finding', 'side', 'quadrant', 'size', 'count'}


def test_the_answer_after_an_edit_is_true_of_the_edited_scene():
    said = {(o['question'], o['answer']): edits(o, 32) for o in items() if o['question_type'] in ('side', 'quadrant')}
    for (q, a), e in said.items():
        if e is None: continue
        if a in ('left', 'right'): assert {a, e['answer']} == {'left', 'right'}
        if ' ' in a: assert a.split()[0] == e['answer'].split()[0] and a.split()[1] != e['answer'].split()[1]


def test_curves_of_the_true_order_enclose_all_others(pair, monkeypatch):
    model, processor = pair
    s = asked(processor)[0]
    weight = np.random.default_rng(1).random((8, 8))**4
    def scores(model, sample, pixels=None, vectors=None, tokens=None, **kw):
        same = (pixels[:, :, :96, :96] == sample.pixels).all(1).reshape(-1, 8, 12, 8, 12).all(4).all(2)
        return (same.numpy()*weight).sum((1, 2))
    monkeypatch.setattr(fa, 'answer_scores', scores)
    maps = {'truth': weight, 'wrong': -weight, 'centre': fa.centre_map((8, 8)), 'random': np.random.default_rng(2).random((8, 8))}
    shares, got = fa.curves(model, processor, s, maps)
    del_, ins = [{k: fa.area(shares, v[i]) for k, v in got.items()} for i in (0, 1)]
    assert min(del_, key=del_.get) == 'truth' == max(ins, key=ins.get) and max(del_, key=del_.get) == 'wrong' == min(ins, key=ins.get)
    samples = asked(processor)
    stack = {k: np.stack([v, v]) for k, v in maps.items() if k == 'truth'}
    areas, drop = fa.all_areas(model, processor, samples, stack | fa.knowing_nothing(stack, [[]]*2, [(0, 0, 1, 1)]*2, ['a', 'b'], ('random', 'centre')), ['a', 'b'])
    rows = {(m, c, b): v for m, c, b, v in fa.curve_rows(areas, drop, ['a', 'b'])}
    assert rows['truth', 'deletion', 'random'][0] > .1 and rows['truth', 'insertion', 'centre'][0] > .1
    assert np.isclose(drop, weight.sum()).all() and ('truth', 'deletion', 'inverted') in rows


def test_a_blind_model_gains_nothing_and_is_chosen_for_nothing(pair):
    model, processor = pair
    samples = [at.encode_sample(processor, picture(seed=i), 'Where?', 'left') for i in range(4)]
    no_eyes = fa.blind(model, samples)
    maps = fa.make_maps(no_eyes, processor, samples, ['attention', 'relevancy', 'gradient', 'pixel_gradient', 'occlusion'])
    assert np.allclose(maps['relevancy'][0], maps['relevancy'][1], atol=1e-6) and not maps['pixel_gradient'].any()
    rows = fa.faithfulness(no_eyes, processor, samples, [[(.1, .1, .2, .2)]]*4, list('abcd'), {k: 0 for k in maps}, 'blind')
    gains = [o for o in rows if o['metric'].startswith(('deletion', 'insertion')) and o['baseline']]
    assert gains and all(abs(o['value']) < 1e-3 for o in gains)
    best, why = fa.best_method(rows)
    assert best is None and 'no map beats' in why and set(rows[0]) == set(fa.FAITHFULNESS_COLUMNS)


def test_what_cannot_be_scaled_is_not_a_number():
    nothing = fa.gain([0, 0], [0, 0], ["a", "b"])
    assert nothing[0] == 0 and np.isnan(nothing[1:]).all()
    assert np.isnan(fa.gain([.5, .2], [-1, .5], ['a', 'b'])).all()
    alike = fa.gain([.5, .5], [1, 1], ["a", "b"])   # no bounds are known, so no interval
    assert alike[0] == .5 and np.isnan(alike[1:]).all()
    rows = [dict(model='m', method='x', layer=0, metric=f'{c}.pixels.mean', baseline=b, value=np.nan, low=np.nan, high=np.nan)
            for c in ('deletion', 'insertion') for b in ('random', 'centre')]
    assert fa.best_method(rows)[0] is None


def test_rows_of_a_constant_map_are_those_of_chance(pair):
    rng = np.random.default_rng(0)
    target = rng.random((50, 6, 6)) < .2
    same = np.ones((50, 6, 6))
    got = fa.localisation(same, None, None, masks=list(target))
    assert np.allclose(got['pointing'], target.mean((1, 2))) and np.allclose(got['auprc'], target.mean((1, 2)))
    right = fa.localisation(target.astype(float), None, None, masks=list(target))
    assert np.allclose(right['auprc'], 1) and np.allclose(right['iou'], 1) and (right['energy_lift'] > 1).all()


def test_random_weights_change_maps_and_leave_the_model_alone(pair):
    model, processor = pair
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for k, tower in ((1, False), (2, True)):
        new = fa.randomised(model, k, tower, seed=5)
        changed = {n.split('.layers.')[1][0] for n, v in new.state_dict().items() if 'language_model.layers' in n and v.ndim > 1 and not torch.equal(v, before[n])}
        assert changed == {str(i) for i in range(2 - k, 2)}
        fa.make_maps(new, processor, asked(processor), ['relevancy_pixels', 'attention'])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match='has 2 layers'): fa.randomised(model, 3)


def test_sanity_rows_and_mirrors(pair):
    model, processor = pair
    texts = [('Where is it, left or right?', 'left'), ('Where is the nodule, left or right?', 'right')]*2
    samples = [at.encode_sample(processor, picture(seed=i//2), *t) for i, t in enumerate(texts)]
    boxes = [[(.1, .1, .2, .2)], [(.6, .6, .2, .2)]]*2
    rows = fa.sanity(model, processor, samples, texts, boxes, ['a', 'a', 'b', 'b'], {'attention': 0})
    assert {o['metric'] for o in rows} == {'sanity.random_weights', 'sanity.mirror', 'sanity.question_swap'}
    assert all(np.isfinite(o['value']) for o in rows)
    turned = fa.mirrored(processor, samples[0], *texts[0])
    assert turned.answer == 'right' and torch.equal(turned.pixels.flip(-1), samples[0].pixels)
    assert fa._turned('is it on the left, or the right?') == 'is it on the right, or the left?'


def test_slake_masks_become_cells():
    folder = runs.test_data() and runs.test_data()/'slake'
    if not folder or not folder.is_dir(): pytest.skip('needs LLAVA_MED_TESTDATA')
    found = 0
    for o in read_slake(folder, 'test'):
        path = folder/'imgs'/o['images'][0]
        if not path.exists() or not any(r.get('mask') for r in o['regions']): continue
        size = Image.open(path).size
        for window in ((0, 0, 1, 1), (.125, 0, .875, 1)):
            cells = fa.item_cells(o, (8, 8), window, size, folder/'imgs')
            assert cells.shape == (8, 8) and (cells.any() or window[0] > 0) and not cells.all()
        found += 1
    assert found > 5


@pytest.mark.parametrize('call,words', [
    (lambda m, p, s: fa.curves(m, p, s[0], {'x': np.full((8, 8), np.nan)}), 'NaN'),
    (lambda m, p, s: fa.curves(m, p, s[0], {'x': np.ones((8, 8))}, unit='heads'), "'pixels' or 'tokens'"),
    (lambda m, p, s: fa.make_maps(m, p, s, ['grad_cam']), "no map method named 'grad_cam'"),
    (lambda m, p, s: fa.make_maps(m, p, []), 'No question is left'),
    (lambda m, p, s: fa.elsewhere_mean(np.ones((2, 3, 3)), ['a', 'a']), 'at least two pictures'),
    (lambda m, p, s: fa.next_partners(['a', 'a']), 'all questions are about one'),
    (lambda m, p, s: fa.best_method([dict(model='a'), dict(model='b')]), '2 models'),
    (lambda m, p, s: fa.best_method([dict(model='a', method='x', metric='iou', baseline='', value=0.)]), 'no curves')])
def test_bad_requests_are_refused_in_a_sentence(pair, call, words):
    model, processor = pair
    with pytest.raises(ValueError, match=words): call(model, processor, asked(processor))
