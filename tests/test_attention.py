"""Geometry of attention maps over many sizes, other model shapes, and what must be refused."""
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, Dinov2WithRegistersConfig, GptOssConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_med.explain import attention as at
from llava_med.explain.maps import MAP_METHODS
from llava_med.models.llava import tiny_model


@pytest.fixture(scope='module')
def pair():
    return tiny_model()


def picture(size=(96, 96), seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def view_processor(kind, width, height):
    if kind == 'crop':
        return LlavaImageProcessorPil(size={'shortest_edge': max(width, height)}, do_pad=False,
                                      crop_size={'height': height, 'width': width})
    if kind == 'pad':
        return LlavaImageProcessorPil(size={'shortest_edge': max(width, height)}, do_pad=True,
                                      crop_size={'height': height, 'width': width})
    if kind == 'small':   # the crop is larger than the resized picture, so margins are added
        return LlavaImageProcessorPil(size={'shortest_edge': min(width, height)//2}, do_pad=False,
                                      crop_size={'height': height, 'width': width})
    return LlavaImageProcessorPil(size={'height': height, 'width': width}, do_pad=False, do_center_crop=False)


@pytest.mark.parametrize('kind', ['crop', 'pad', 'small', 'stretch'])
def test_a_bright_block_arrives_where_the_window_says(kind):
    rng = np.random.default_rng(0)
    for trial in range(25):
        size = tuple(int(o) for o in rng.integers(40, 400, 2))
        view = tuple(int(o)*12 for o in rng.integers(3, 12, 2))        # square or not
        ip = view_processor(kind, *view)
        (x0, y0, x1, y1), got = at.view_window(ip, size)
        assert got == view
        side = max(3, max(size)//16)
        x, y = [int(rng.integers(0, s - side)) for s in size]
        a = np.zeros((size[1], size[0], 3), np.uint8)
        a[y:y+side, x:x+side] = 255
        px = [ip(Image.fromarray(o), return_tensors='pt')['pixel_values'][0] for o in (a, a*0)]
        change = (px[0] - px[1]).abs().sum(0).numpy()
        assert change.shape == view[::-1]
        u = ((x + side/2)/size[0] - x0)/(x1 - x0)*view[0]                # where it should be, view pixels
        v = ((y + side/2)/size[1] - y0)/(y1 - y0)*view[1]
        reach = side/size[0]/(x1 - x0)*view[0]/2 + 3, side/size[1]/(y1 - y0)*view[1]/2 + 3
        if not (reach[0] < u < view[0] - reach[0] and reach[1] < v < view[1] - reach[1]): continue
        yy, xx = np.mgrid[:view[1], :view[0]] + .5
        centre = (change*xx).sum()/change.sum(), (change*yy).sum()/change.sum()
        assert np.allclose(centre, (u, v), atol=.75), (kind, size, view, centre, (u, v))


def test_overlay_and_cells_agree():
    rng = np.random.default_rng(1)
    for _ in range(30):
        grid, size = tuple(rng.integers(1, 9, 2)), tuple(int(o) for o in rng.integers(20, 200, 2))
        x0, y0 = rng.uniform(-.5, .3, 2)
        window = x0, y0, x0 + rng.uniform(.5, 1.5), y0 + rng.uniform(.5, 1.5)
        layer = at.overlay(np.arange(grid[0]*grid[1]).reshape(grid), window, size)
        cells = at.cell_boxes(grid, window).reshape(-1, 4)
        for _ in range(10):
            px, py = [int(rng.integers(0, s)) for s in size]
            fx, fy = (px + .5)/size[0], (py + .5)/size[1]
            inside = [i for i, (a, b, c, d) in enumerate(cells) if a <= fx < c and b <= fy < d]
            assert (inside == [] and np.isnan(layer[py, px])) or inside == [layer[py, px]]


def test_every_visible_box_has_a_target_and_a_constant_map_is_random():
    rng = np.random.default_rng(2)
    for _ in range(50):
        grid = tuple(rng.integers(1, 12, 2))
        w, h = rng.uniform(.01, .5, 2)
        box = [(rng.uniform(0, 1 - w), rng.uniform(0, 1 - h), w, h)]
        target = at.target_cells(box, grid)
        assert target.any()
        assert np.isclose(at.pointing_game(np.ones(grid), box), at.random_rate(box, grid))
        assert np.isclose(at.box_cover(box, grid, fine=64).mean(), w*h, atol=.02)


VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
              image_size=96, patch_size=12)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=320, max_position_embeddings=512)


@pytest.mark.parametrize('vision,text,strategy', [
    (CLIPVisionConfig, MistralConfig, 'default'), (SiglipVisionConfig, Qwen2Config, 'full'),
    (CLIPVisionConfig, LlamaConfig, 'full')])
def test_other_towers_and_decoders_with_shared_keys(pair, vision, text, strategy):
    _, processor = pair
    tok = processor.tokenizer
    config = LlavaConfig(vision_config=vision(**VISION), text_config=text(**TEXT), vision_feature_layer=-1,
                         vision_feature_select_strategy=strategy,
                         image_token_index=tok.convert_tokens_to_ids('<image>'))
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    own = type(processor)(image_processor=processor.image_processor, tokenizer=tok, patch_size=12,
                          vision_feature_select_strategy=strategy, chat_template=processor.chat_template,
                          num_additional_image_tokens=int(vision is CLIPVisionConfig))
    samples = [at.encode_sample(own, picture(seed=i), q, a) for i, (q, a) in
               enumerate([('Where?', 'left'), ('In which quadrant is it?', 'upper right')])]
    for s, one in zip(samples, at.trace(model, samples)):          # left-padded batch
        assert s.grid == (8, 8) and len(s.image_at) == 64
        model.set_attn_implementation({'text_config': 'eager'})
        out = model(s.ids[None], s.pixels[None], use_cache=False, output_attentions=True)
        t = np.arange(len(s.ids) - s.n_answer, len(s.ids))
        want = torch.stack(out.attentions)[:, 0, :, t - 1]
        logp = out.logits.log_softmax(-1)[0, t - 1, s.ids[t]]
        grads = torch.autograd.grad(logp.sum(), out.attentions)
        model.set_attn_implementation({'text_config': 'sdpa'})
        assert np.abs(want.detach().numpy() - one.rows).max() <= 1e-6
        assert np.allclose(torch.stack(grads)[:, 0, :, t - 1].numpy(), one.row_grads, atol=1e-6)
        assert np.allclose(logp.detach().numpy(), one.logprobs, atol=1e-5)
        assert np.allclose(one.rows.sum(-1), 1, atol=1e-5)
        assert all((one.rows[:, :, i, p:] == 0).all() for i, p in enumerate(t))


def test_the_implementation_is_put_back_after_an_error(pair):
    model, _ = pair
    decoder = model.model.language_model
    with pytest.raises(RuntimeError, match='stop'):
        with at.capture_rows(model, torch.tensor([0])): raise RuntimeError('stop')
    assert decoder.config._attn_implementation == 'sdpa'
    assert not hasattr(decoder.layers[0].self_attn, 'rows_wanted')


def test_a_portrait_picture_gives_the_marked_patch_back(pair):
    model, processor = pair
    s = at.encode_sample(processor, picture((100, 300)), 'Where?', 'left')
    assert s.window == (-1.0, 0.0, 2.0, 1.0)                           # padded to a square
    mark = np.zeros(len(s.ids))
    mark[s.image_at[3*8 + 4]] = 1
    layer = at.overlay(at.to_grid(mark, s), s.window, s.size)
    ys, xs = np.nonzero(layer == 1)
    assert not np.isnan(layer).any() and ys.min() >= 112 and ys.max() < 150 and xs.min() == 50


@pytest.mark.parametrize('change,words', [
    (lambda p: dict(image=[picture(), picture()]), '2 were given'),
    (lambda p: dict(answer=''), 'no tokens'),
    (lambda p: dict(answer=[]), 'no tokens'),
    (lambda p: dict(prompt='no picture in here'), '0 <image> tokens')])
def test_bad_requests_are_refused_in_a_sentence(pair, change, words):
    _, processor = pair
    args = dict(image=picture(), question='Where?', answer='left', prompt=None) | change(processor)
    with pytest.raises(ValueError, match=words): at.encode_sample(processor, **args)


def test_a_model_without_the_parts_is_refused():
    with pytest.raises(ValueError, match='LlavaForConditionalGeneration'):
        at.language_model(torch.nn.Linear(2, 2))


def test_attention_with_sinks_is_refused(pair):
    _, processor = pair
    text = GptOssConfig(**{**TEXT, 'head_dim': 8}, num_local_experts=2, num_experts_per_tok=1, layer_types=['full_attention']*2)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, vision_feature_layer=-1,
                                                      image_token_index=processor.image_token_id)).eval()
    with pytest.raises(ValueError, match='GptOssModel has attention of its own'):
        at.trace(model, [at.encode_sample(processor, picture(), 'Where?', 'left')])


def test_a_grid_that_does_not_fit_the_tokens_is_refused(pair):
    _, processor = pair
    other = type(processor)(image_processor=processor.image_processor, tokenizer=processor.tokenizer,
                            patch_size=12, vision_feature_select_strategy='default',
                            num_additional_image_tokens=50, chat_template=processor.chat_template)
    with pytest.raises(ValueError, match='8 x 8 patches'): at.encode_sample(other, picture(), 'Where?', 'left')


def registers(pair, n=4, kind=Dinov2WithRegistersConfig, last=False, **kw):
    "A LLaVA whose tower has registers, and its processor; with `last` they stand behind the patches."
    _, processor = pair
    tok = processor.tokenizer
    vision = kind(**{**VISION, **kw}, num_register_tokens=n)
    own = type(processor)(image_processor=processor.image_processor, tokenizer=tok, patch_size=12, chat_template=processor.chat_template,
                          vision_feature_select_strategy='default', num_additional_image_tokens=n + 1)
    text = LlamaConfig(**{**TEXT, 'vocab_size': len(tok)})
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=[0], image_seq_length=64 + n,
                         image_token_index=tok.convert_tokens_to_ids('<image>'))
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    if last:
        embed = model.model.vision_tower.embeddings
        embed.register_forward_hook(lambda m, a, x: torch.cat([x[:, :1], x[:, 1 + n:], x[:, 1:1 + n]], 1))
    return model, own


@pytest.mark.parametrize('n', [1, 4, 7])
def test_registers_are_no_patches(pair, n):
    model, processor = registers(pair, n)
    sample = at.encode_sample(processor, picture(), 'Where?', 'left')
    images = np.flatnonzero(sample.kinds == at.TOKEN_KINDS.index('image'))
    assert len(images) == 64 + n and sample.image_at.tolist() == images[n:].tolist()
    for row, col in ((0, 0), (3, 5), (7, 7)):   # a patch that is whited out changes the vector at its place, and no other
        marked = at.Sample(**{**vars(sample), 'pixels': sample.pixels.clone()})
        marked.pixels[:, row*12:row*12 + 12, col*12:col*12 + 12] = 3.
        one, other = at.image_vectors(model, [sample, marked])
        moved = (one != other).any(-1).nonzero().flatten().tolist()
        assert [images[m] for m in moved] == [sample.image_at[row*8 + col]]
    maps = at.all_maps(model, [sample], [at.neutral_sample(processor, picture())])
    assert all(maps[k].shape == (1, 2, 8, 8) for k in at.ATTENTION_METHODS)
    got, = at.trace(model, [sample])
    assert np.allclose(at.to_grid(got.rows, sample).ravel(), got.rows[..., images[n:]].ravel())


def test_all_methods_draw_maps_over_registers(pair):
    model, processor = registers(pair)
    model.config.vision_feature_layer = -1
    sample = at.encode_sample(processor, picture(), 'Where?', 'left')
    for name, f in MAP_METHODS.items():
        if name.startswith('static'): continue
        for m in f(model, processor, [sample]): assert m.shape[-2:] == (8, 8) and np.isfinite(m).all(), name


def test_registers_behind_the_patches_are_refused(pair):
    model, processor = registers(pair, last=True)
    sample = at.encode_sample(processor, picture(), 'Where?', 'left')
    with pytest.raises(ValueError, match='not the last ones'): at.trace(model, [sample])
