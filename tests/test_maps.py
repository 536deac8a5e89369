"Maps by every method: against slow ways to make them, on other models and grids, and what must be refused."
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava_med.explain import attention as at
from llava_med.explain import faithfulness as fa
from llava_med.explain import maps as mp
from llava_med.models.llava import join, make_processor, tiny_model, train_tokenizer
from test_llava import language, tower

QUESTIONS = [('Where is the nodule?', 'left lung'), ('In which quadrant is the small nodule, left or right?', 'a')]


def picture(size=(96, 96), seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def asked(processor, size=(96, 96)):
    return [at.encode_sample(processor, picture(size, i), q, a) for i, (q, a) in enumerate(QUESTIONS)]


@pytest.fixture(scope='module')
def pair(): return tiny_model(depth=3)


def eager(model, s, tokens=None):
    "Attention of every layer, its gradient, and the predicting rows, through the path that keeps everything."
    model.set_attn_implementation({'text_config': 'eager'})
    out = model(s.ids[None], s.pixels[None], use_cache=False, output_attentions=True)
    model.set_attn_implementation({'text_config': 'sdpa'})
    t = torch.arange(len(s.ids) - s.n_answer, len(s.ids))
    if tokens is not None: t = t[tokens]
    logp = out.logits.log_softmax(-1)[0, t - 1, s.ids[t]].sum()
    return out, t - 1, logp, torch.autograd.grad(logp, out.attentions)


@pytest.mark.parametrize('tokens', [None, [0]])
def test_walks_equal_full_products_in_a_padded_batch(pair, tokens):
    model, processor = pair
    samples = asked(processor)
    got, plain = mp.METHODS['relevancy'](model, processor, samples, tokens), mp.METHODS['rollout'](model, processor, samples, tokens)
    for s, r, o in zip(samples, got, plain):
        out, rows, _, grads = eager(model, s, tokens)
        for low in range(len(grads)):
            R = W = torch.eye(len(s.ids))
            for a, g in list(zip(out.attentions, grads))[low:]:
                R = R + (a*g).clamp(min=0)[0].mean(0).detach() @ R
                W = (a[0].mean(0).detach() + torch.eye(len(s.ids)))/2 @ W
            assert np.allclose(r[low, 0], at.to_grid(R[rows].sum(0).numpy(), s), atol=1e-6)
            assert np.allclose(o[low, 0], at.to_grid(W[rows].sum(0).numpy(), s), atol=1e-6)


@pytest.mark.parametrize('tokens', [None, 0])
def test_rows_and_their_gradients_equal_eager_ones(pair, tokens):
    model, processor = pair
    samples = asked(processor)
    rows, useful = [mp.METHODS[k](model, processor, samples, tokens) for k in ('attention', 'attention_gradient')]
    for s, a, u in zip(samples, rows, useful):
        out, t, _, grads = eager(model, s, None if tokens is None else [tokens])
        for l, (w, g) in enumerate(zip(out.attentions, grads)):
            assert np.abs(a[l] - at.to_grid(w[0, :, t].mean(1).detach().numpy(), s)).max() <= 1e-6
            assert np.allclose(u[l], at.to_grid((w*g).clamp(min=0)[0, :, t].mean(1).detach().numpy(), s), atol=1e-6)


def test_blocks_of_rows_do_not_change_a_walk(pair):
    model, processor = pair
    with mp.forward(model, asked(processor), parts=True) as p:
        grads = mp.slopes(p.score, [o['out'] for o in p.parts])
        assert torch.allclose(mp.walk(p.start, p.parts, grads), mp.walk(p.start, p.parts, grads, block=7), atol=1e-7)


def test_capture_leaves_logits_and_implementations_alone(pair):
    model, processor = pair
    s = asked(processor)[0]
    with torch.no_grad(): before = model(s.ids[None], s.pixels[None]).logits
    score = mp.answer_scores(model, s, s.pixels[None])[0]
    t = torch.arange(len(s.ids) - s.n_answer, len(s.ids))
    assert np.isclose(score, before.log_softmax(-1)[0, t - 1, s.ids[t]].sum().item(), atol=1e-4)
    with mp.tower_parts(model, [s]) as (v, _, _), mp.forward(model, [s], None, v, parts=True) as p:
        assert np.isclose(p.score.item(), score, atol=1e-4)
    with torch.no_grad(): assert torch.equal(before, model(s.ids[None], s.pixels[None]).logits)
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == 'sdpa'
    assert not any(hasattr(o, 'parts_kept') for o in model.modules())


def test_integrated_gradients_are_complete_and_the_last_layer_has_no_gradient(pair):
    model, processor = pair
    for s, m in zip(asked(processor), mp.METHODS['integrated_gradients'](model, processor, asked(processor))):
        own = mp.answer_scores(model, s, torch.stack([s.pixels, mp.infill(s)]))
        assert np.isclose(m.sum(), own[0] - own[1], atol=1e-3)
    s = asked(processor)[0]
    with mp.forward(model, [s]) as p:
        top = torch.autograd.grad(p.score.sum(), p.states[-1])[0]
        assert float(top[0, p.at[0]].abs().max()) == 0


def test_gradient_by_token_equals_a_finite_difference(pair):
    model, processor = pair
    s = asked(processor)[0]
    own = at.image_vectors(model, [s])[0]
    with mp.forward(model, [s]) as p: g = mp.slopes(p.score, [p.x])[0][0, p.at[0]]
    step = torch.zeros_like(own); step[5] = 1e-2*g[5]/g[5].norm()
    up, down = mp.answer_scores(model, s, vectors=torch.stack([own + step, own - step]))
    assert np.isclose((up - down)/2e-2, float(g[5].norm()), rtol=.05)


def test_occlusion_is_the_difference_of_two_answers(pair):
    model, processor = pair
    s, other = asked(processor)
    for kind in mp.INFILLS:
        m = mp.METHODS['occlusion'](model, processor, s, kind=kind, other=[other])[0][0, 0]
        px, fill = s.pixels.clone(), mp.infill(s, kind, other)
        px[:, 36:48, 60:72] = fill[:, 36:48, 60:72]
        a, b = mp.answer_scores(model, s, torch.stack([s.pixels, px]))
        assert np.isclose(m[3, 5], a - b, atol=1e-4)
    coarse = mp.METHODS['occlusion'](model, processor, s, block=3)[0][0, 0]
    assert len(np.unique(coarse)) <= 9 and coarse[0, 0] == coarse[2, 2]


def test_a_tower_that_mixes_nothing_keeps_a_token_in_its_patch(pair):
    model, processor = pair
    samples = asked(processor)
    one = np.zeros((2, 8, 8)); one[:, 2, 6] = 1
    assert np.all(mp.back_project(model, samples, one).reshape(2, -1).argmax(1) == 2*8 + 6)
    with mp.tower_parts(model, samples, gradients=False) as (_, parts, extra):
        assert extra == 1 and len(parts) == 3 and parts[0]['key'].shape[2] == 65
        eye = [dict(p, query=p['query']*0, key=p['key']*0) for p in parts]      # even attention everywhere
        r = mp.walk(torch.ones(2, 65), eye, causal=False)
        assert torch.allclose(r, torch.ones_like(r), atol=1e-5)


def test_ask_again_is_encoding_again(pair):
    _, processor = pair
    for i, (q, a) in enumerate(QUESTIONS):
        want, got = at.encode_sample(processor, picture(seed=5), q, a), mp.other_question(processor, at.encode_sample(processor, picture(seed=5), 'x', 'b'), q, a)
        assert torch.equal(want.ids, got.ids) and (want.kinds == got.kinds).all() and (want.image_at == got.image_at).all()


def with_grid(across, down):
    "A tiny model and processor whose view is not square."
    processor = make_processor(train_tokenizer(['a small nodule in the left lung'], 300), 96, 12)
    processor.image_processor.size = {'height': 12*down, 'width': 12*across}
    processor.image_processor.crop_size = {'height': 12*down, 'width': 12*across}
    processor.image_processor.do_pad, processor.image_processor.do_center_crop = False, False
    model, _ = tiny_model(processor)
    get = model.model.get_image_features
    model.model.get_image_features = lambda pixel_values, **kw: get(pixel_values, interpolate_pos_encoding=True, **kw)
    return model, processor


def every_method(model, processor, samples, names=None):
    for name in names or mp.METHODS:
        for s, m in zip(samples, mp.METHODS[name](model, processor, samples)):
            assert m.ndim == 4 and m.shape[2:] == s.grid and np.isfinite(m).all(), name
            assert m.std() > 0 or name == 'tam', name


def test_a_grid_that_is_not_square():
    model, processor = with_grid(5, 3)
    samples = asked(processor, (200, 120))
    assert samples[0].grid == (3, 5)
    every_method(model, processor, samples)
    s = samples[0]
    shares, got = fa.curves(model, processor, s, {'x': np.arange(15).reshape(3, 5)})
    assert len(shares) == len(got['x'][0]) and np.isclose(got['x'][0][-1], got['x'][1][0])
    assert mp.back_project(model, [s], np.ones((1, 3, 5))).shape == (1, 3, 5)


@pytest.mark.parametrize('vision,kind', [('clip', 'mistral'), ('siglip', 'qwen2'), ('vit', 'llama')])
def test_models_joined_from_parts(tmp_path, vision, kind):
    model, processor = join(tower(tmp_path/'tower', vision), language(tmp_path/'lm', kind), say=lambda x: None)
    samples = asked(processor, (60, 90))
    assert samples[0].grid == (4, 4)
    every_method(model, processor, samples)
    maps = {k: v[:, 0] for k, v in fa.make_maps(model, processor, samples, ['relevancy']).items()}
    assert set(fa.all_areas(model, processor, samples, maps, ['a', 'b'], 'tokens', 'other')[0]) == {'relevancy'}


@pytest.mark.parametrize('size', [(200, 96), (96, 200), (150, 150)])
@pytest.mark.parametrize('crop', [True, False])
def test_a_changed_patch_of_the_picture_is_the_patch_that_occlusion_moves(pair, size, crop):
    model, processor = pair
    own = type(processor)(image_processor=type(processor.image_processor)(**{**processor.image_processor.to_dict(), 'do_pad': not crop}),
                          tokenizer=processor.tokenizer, patch_size=12, vision_feature_select_strategy='default',
                          num_additional_image_tokens=1, chat_template=processor.chat_template)
    s = at.encode_sample(own, picture(size), *QUESTIONS[0])
    cell = at.cell_boxes(s.grid, s.window)[3, 4]
    x, y = round((cell[0] + cell[2])/2*size[0]), round((cell[1] + cell[3])/2*size[1])
    dark, bright = np.zeros((size[1], size[0], 3), np.uint8), np.zeros((size[1], size[0], 3), np.uint8)
    bright[y, x] = 255
    change = (at.encode_sample(own, Image.fromarray(bright), *QUESTIONS[0]).pixels - at.encode_sample(own, Image.fromarray(dark), *QUESTIONS[0]).pixels)
    patch = change.abs().sum(0)[:96, :96].reshape(8, 12, 8, 12).sum((1, 3)).numpy()
    assert np.unravel_index(patch.argmax(), (8, 8)) == (3, 4)
    layer = at.overlay(patch, s.window, s.size)
    assert layer[y, x] == patch.max()


# What a user may bring

def test_another_kernel_chosen_by_the_user_is_given_back(pair):
    model, processor = pair
    samples = asked(processor)
    want = {k: mp.METHODS[k](model, processor, samples) for k in ('relevancy', 'attention', 'relevancy_pixels')}
    AttentionInterface.register('someones_kernel', sdpa_attention_forward); AttentionMaskInterface.register('someones_kernel', sdpa_mask)
    model.set_attn_implementation('someones_kernel')
    try:
        for k, v in want.items(): assert np.allclose(mp.METHODS[k](model, processor, samples)[1], v[1], atol=1e-6)
        assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == 'someones_kernel'
    finally: model.set_attn_implementation('sdpa')


def test_quantised_weights_give_maps_without_gradients_and_a_sentence_with_them():
    model, processor = tiny_model()
    quantised = torch.ao.quantization.quantize_dynamic(model.float(), {torch.nn.Linear}, dtype=torch.qint8)
    quantised.lm_head = model.lm_head
    samples = asked(processor)
    every_method(quantised, processor, samples, [k for k, v in mp.METHOD_FACTS.items() if v['sees'] != 'white'])
    for k in [k for k, v in mp.METHOD_FACTS.items() if v['sees'] == 'white']:
        with pytest.raises(ValueError, match='No gradient passes'): mp.METHODS[k](quantised, processor, samples)
    quantised.is_quantized = True
    with pytest.raises(ValueError, match='without quantisation'): fa.randomised(quantised, 1)
    with pytest.raises(ValueError, match='without quantisation'): fa.blind(quantised, samples)


def test_half_precision(pair):
    _, processor = pair
    model, _ = tiny_model()
    every_method(model.to(torch.bfloat16), processor, asked(processor))


@pytest.mark.parametrize('tokens,words', [(99, 'no token 99'), ([0, -1], 'no token -1'), ([], 'nothing to map')])
def test_tokens_that_are_not_there(pair, tokens, words):
    model, processor = pair
    with pytest.raises(ValueError, match=words): mp.METHODS['attention'](model, processor, asked(processor)[:1], tokens)


def test_no_picture_several_pictures_and_no_sample(pair):
    model, processor = pair
    with pytest.raises(ValueError, match='No picture'): at.encode_sample(processor, None, *QUESTIONS[0])
    with pytest.raises(ValueError, match='2 were given'): at.encode_sample(processor, [picture(), picture()], *QUESTIONS[0])
    with pytest.raises(ValueError, match='nothing to map'): mp.METHODS['tam'](model, processor, [])
    with pytest.raises(ValueError, match='another picture'): mp.infill(asked(processor)[0], 'other')
    with pytest.raises(ValueError, match="choose one of mean"): mp.infill(asked(processor)[0], 'black')


def test_a_map_of_nan_is_refused_not_drawn():
    model, processor = tiny_model()
    with torch.no_grad(): model.model.language_model.layers[0].self_attn.q_proj.weight[0] = float('nan')
    for k in ('attention', 'relevancy', 'occlusion'):
        with pytest.raises(ValueError, match=f'{k} map of the answer .* NaN'): mp.METHODS[k](model, processor, asked(processor))


def test_a_tower_without_attention_has_no_way_back(pair):
    model, processor = pair
    model, _ = tiny_model()
    s = asked(processor)[:1]
    model.model.vision_tower = torch.nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match='Conv2d has no layers of self-attention'): mp.tower_layers(model)
    with pytest.raises(ValueError, match='model.language_model.layers'): mp.METHODS['relevancy'](torch.nn.Linear(2, 2), processor, s)


def test_a_method_is_found_by_name_and_refused_with_the_known_ones(monkeypatch):
    from llava_med.core.registry import UnknownName
    with pytest.raises(UnknownName, match="no map method named 'atention'. Did you mean attention.*Known: attention, "): mp.MAP_METHODS.named('atention')
    assert mp.METHODS is mp.MAP_METHODS and set(mp.MAP_METHODS) == set(mp.METHOD_FACTS)
    with pytest.raises(ValueError, match="already a map method named 'attention'"): mp.method('attention', 'black', 'pixels', '0', 'a toy')(lambda *a: [])
    assert mp.METHOD_FACTS['attention']['sees'] == 'grey', 'the facts of the first stay'
    with pytest.raises(ValueError, match="sees 'blue' and is of 'tokens'"): mp.method('toy', 'blue', 'tokens', '1', '')
