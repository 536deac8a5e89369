"What the cells of generation cannot say: other models, adapters, options of all of them."
import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor, MistralConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from conftest import REPO
from llava_med.generate import answers, prefix_cache
from llava_med.generate.answers import answer, chat, option_logprobs, plain_answer
from llava_med.models.llava import assemble, load, make_processor, train_tokenizer

QUESTIONS = ('is there a nodule?', 'which organ is shown in this picture of the body?', 'where?', 'how many lesions are there in the left lung?')


def quilt(rng, size=96):
    squares = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((size//4, size//4, 1)))
    return Image.fromarray(squares.astype(np.uint8))


def loud(model, seed=0):
    "Random weights turned up, so that answers depend on the picture; they would all be alike otherwise."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in model.parameters():
            if p.dim() > 1: p.data.mul_(8)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def grouped(kind):
    "A small model whose four query heads share one key head, of one or another family."
    processor = make_processor(train_tokenizer(QUESTIONS, 300), 48, 12)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12)
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, vocab_size=320)
    text = MistralConfig(**text, sliding_window=None) if kind == 'mistral' else LlamaConfig(**text)
    model = loud(assemble(vision, text, processor))
    if kind == 'eager': model.set_attn_implementation('eager')
    return model, processor


MODELS = {'shipped': lambda: load(REPO/'data/base_tiny'), 'grouped': lambda: grouped('llama'), 'mistral': lambda: grouped('mistral'),
          'eager': lambda: grouped('eager')}


def alone(model, processor, images, question, n):
    "What `generate` says to one question, and how many tokens that is."
    x = processor(images=list(images) or None, text=chat(processor, question, len(images)), return_tensors='pt', add_special_tokens=False)
    out = model.generate(**x, max_new_tokens=n, do_sample=False)[0, x['input_ids'].shape[1]:].tolist()
    ends = answers.end_ids(model, processor.tokenizer)
    said = out[:-1] if out[-1] in ends else out
    assert not ends & set(said)
    return processor.tokenizer.decode(said, skip_special_tokens=True).strip(), len(out)


@pytest.mark.parametrize('name', MODELS)
def test_answers_are_those_of_generate(name):
    model, processor = MODELS[name]()
    rng, n = np.random.default_rng(1), 12
    pictures = [quilt(rng) for _ in range(5)]
    asked = [((p,), q + ' please'*(i % 3)) for p in pictures for i, q in enumerate(QUESTIONS)]
    asked += [((pictures[0], pictures[1]), QUESTIONS[0]), ((pictures[1], pictures[0]), QUESTIONS[1]), ((), QUESTIONS[0]), ((), QUESTIONS[3])]
    asked += [((pictures[2],), ' '.join(QUESTIONS*3))]
    if name != 'shipped':   # ends that come early, late and never
        said = [model.generate(**processor(images=list(p) or None, text=chat(processor, q, len(p)), return_tensors='pt'), max_new_tokens=n,
                               do_sample=False)[0, -n:].tolist() for p, q in asked[:12]]
        model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id] + sorted({s[k] for k, s in enumerate(said)})[::2]
    want = [alone(model, processor, p, q, n) for p, q in asked]
    lengths = {k for _, k in want}
    assert len(lengths) > 2, f'answers of {lengths} tokens test little'
    if name != 'shipped': assert len({t for t, _ in want}) > len(want)//2   # the picture counts; the base, on quilts, sees what it knows
    for batch_size in (1, 3, 7, 64):
        got = answer(model, processor, *zip(*asked), max_new_tokens=n, batch_size=batch_size)
        assert got == [t for t, _ in want], batch_size
    assert plain_answer(model, processor, *zip(*asked), max_new_tokens=n, batch_size=4) == [t for t, _ in want]


def test_answers_of_another_length_limit():
    model, processor = grouped('llama')
    p = quilt(np.random.default_rng(2))
    for n in (1, 2, 40): assert answer(model, processor, [p]*4, QUESTIONS, n) == [alone(model, processor, (p,), q, n)[0] for q in QUESTIONS]


def test_a_picture_is_read_once(monkeypatch):
    model, processor = grouped('llama')
    rng, seen, read = np.random.default_rng(0), [], []
    pictures = [quilt(rng) for _ in range(9)]
    def features(model, processor, images, *a): seen.append(len(images)); return prefix_cache.image_features(model, processor, images, *a)
    def reading(model, ids, feats): read.append(len(ids)); return prefix_cache.read_prefixes(model, ids, feats)
    monkeypatch.setattr(answers, 'image_features', features)
    monkeypatch.setattr(answers, 'read_prefixes', reading)
    asked = [(p, f'{q} {i}') for i in range(3) for q in QUESTIONS for p in pictures]   # the questions of a picture are far apart
    answer(model, processor, *zip(*asked), 2, batch_size=4)
    assert sum(seen) == 9 and sum(read) == 9
    assert max(seen) <= 4, 'a shard of pictures at a time'


def test_adapters_and_modes_stay():
    peft = pytest.importorskip('peft')
    model, processor = grouped('llama')
    p = quilt(np.random.default_rng(3))
    before = answer(model, processor, [p]*4, QUESTIONS, 6)
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=['q_proj'], init_lora_weights=False)).train()
    after = answer(tuned, processor, [p]*4, QUESTIONS, 6)
    assert tuned.training and after != before
    tuned.eval()
    assert after == [alone(tuned, processor, (p,), q, 6)[0] for q in QUESTIONS]


def next_model():
    "A small LLaVA-NeXT: pictures in tiles, another number of patches for every shape."
    tok = train_tokenizer(QUESTIONS, 300)
    images = LlavaNextImageProcessorPil(size={'shortest_edge': 48}, crop_size={'height': 48, 'width': 48}, image_grid_pinpoints=[[48, 96], [96, 48], [96, 96]])
    processor = LlavaNextProcessor(images, tok, patch_size=12, vision_feature_select_strategy='default', num_additional_image_tokens=1,
                                   chat_template=tok.chat_template)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12),
        text_config=LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320),
        image_token_index=tok.convert_tokens_to_ids('<image>'), image_grid_pinpoints=[[48, 96], [96, 48], [96, 96]], vision_feature_layer=-1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration(config).eval()
    model.generation_config.update(pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
    return loud(model), processor


def test_any_model_answers(capsys, monkeypatch):
    monkeypatch.setattr(answers, '_SAID', set())
    model, processor = next_model()
    rng = np.random.default_rng(0)
    pictures = [quilt(rng, s).resize((s, 96)) for s in (96, 48, 200)]
    asked = [((p,), q) for p in pictures for q in QUESTIONS[:3]] + [((), QUESTIONS[0])]
    got = answer(model, processor, *zip(*asked), 6, batch_size=4)
    assert got == [alone(model, processor, p, q, 6)[0] for p, q in asked] and len(set(got)) > 5
    answer(model, processor, *zip(*asked[:1]), 1)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and 'LlavaNextForConditionalGeneration is not LLaVA' in said[0]
    scores = option_logprobs(model, processor, pictures[:1], QUESTIONS[:1], [['yes', 'no', 'yes it is']])[0]
    assert all(v < 0 for v, _ in scores) and scores[2][1] > scores[1][1]


def test_options_of_all_models_are_what_one_pass_says():
    for name in ('grouped', 'eager', 'shipped'):
        model, processor = MODELS[name]()
        rng = np.random.default_rng(0)
        asked = [((quilt(rng),), q, ['left', 'right', 'in both lungs', 'no'][:2 + i]) for i, q in enumerate(QUESTIONS[:3])] + [((), QUESTIONS[0], ['yes'])]
        got = option_logprobs(model, processor, *zip(*asked), batch_size=2)
        for (p, q, options), scores in zip(asked, got):
            for o, (v, n) in zip(options, scores):
                turns = answers.as_turns(q, len(p)) + [{'role': 'assistant', 'content': [{'type': 'text', 'text': o}]}]
                x = processor(images=list(p) or None, text=processor.apply_chat_template(turns), return_tensors='pt', add_special_tokens=False)
                with torch.inference_mode(): logp = model(**x).logits[0].log_softmax(-1)
                ids = x['input_ids'][0]
                want = sum(logp[len(ids)-n+k-1, ids[len(ids)-n+k]].item() for k in range(n))
                assert processor.tokenizer.decode(ids[-n:]) == o + '<|end|>' and abs(v - want) < 1e-3*abs(want) + 1e-3


def test_models_that_share_a_vision_encoder_share_what_it_said(monkeypatch):
    "Base and stage 2 are asked about the same images: the encoder works once, and the answers are those of a store that is empty."
    from llava_med.generate import prefix_cache
    from llava_med.models.anatomy import tower
    from llava_med.models.llava import tiny_model
    from llava_med.train.vision_cache import KeptFeatures
    (base, processor), (tuned, _) = tiny_model(image_size=24), tiny_model(image_size=24, seed=5)
    tower(tuned).load_state_dict(tower(base).state_dict())
    images = [Image.new('RGB', (24, 24), (50*i, 90, 10)) for i in range(4)]*2
    prompts = ['left?']*4 + ['where?']*4
    def fresh(): monkeypatch.setattr(prefix_cache, 'FEATURES', KeptFeatures())
    expected = []
    for model in (base, tuned): fresh(); expected.append(answer(model, processor, images, prompts, max_new_tokens=6))
    fresh()
    calls = []
    for model in (base, tuned): tower(model).register_forward_hook(lambda *a: calls.append(1))
    assert [answer(m, processor, images, prompts, max_new_tokens=6) for m in (base, tuned)] == expected
    assert len(calls) == 1


# Attention that copies no key

@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize('n', [1, 7, 65])
@pytest.mark.parametrize('heads, shared', [(6, 2), (4, 4), (4, 1)])
def test_grouped_attention_is_that_of_pytorch(n, heads, shared, dtype, limit):
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, n, heads, 8, generator=g).to(dtype).transpose(1, 2)   # as a model hands it over
    key, value = torch.randn(2, 2, shared, 90, 8, generator=g).to(dtype)
    seen = torch.rand(2, 1, n, 90, generator=g) > .5
    seen[..., 0] = True
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    want = torch.nn.functional.scaled_dot_product_attention(query, *(t.repeat_interleave(heads//shared, 1) for t in (key, value)), attn_mask=seen)
    got, _ = prefix_cache.grouped_attention(None, query, key, value, mask, 8**-.5)
    assert got.shape == (2, n, heads, 8) and (got.transpose(1, 2) - want).abs().max() < limit


@pytest.mark.parametrize('more', [dict(softcap=30.), dict(position_bias=torch.zeros(1)), dict(s_aux=torch.zeros(4)), dict(dropout=.1)])
def test_grouped_attention_refuses_what_it_does_not_know(more):
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=f'knows no {next(iter(more))}'):
        prefix_cache.grouped_attention(None, q, q, q, torch.zeros(1, 1, 2, 2), 1., **more)


def test_the_attention_of_a_model_is_changed_while_it_reads_only(monkeypatch):
    model, processor = grouped('llama')
    kinds = []
    def seen(model, mask, right=prefix_cache._attention_mask):
        kinds.append(model.config.text_config._attn_implementation)
        return right(model, mask)
    monkeypatch.setattr(prefix_cache, '_attention_mask', seen)
    image = quilt(np.random.default_rng(0), 48)
    answer(model, processor, [image]*4, list(QUESTIONS), 3)
    assert set(kinds) == {'grouped'} and model.config.text_config._attn_implementation == 'sdpa'
    def fails(*args, **kw): raise RuntimeError('no memory')
    monkeypatch.setattr(prefix_cache, '_attention_mask', fails)
    with pytest.raises(RuntimeError, match='no memory'): answer(model, processor, [image], ['where?'], 3)
    assert model.config.text_config._attn_implementation == 'sdpa'


def test_a_model_that_answers_otherwise_with_it_keeps_its_own_attention(monkeypatch):
    model, processor = grouped('llama')
    images, asked = [quilt(np.random.default_rng(0), 48)]*4, list(QUESTIONS)
    want = answer(copy.deepcopy(model), processor, images, asked, 6)
    def wrong(module, query, key, *args, **kw): return prefix_cache.grouped_attention(module, query*2, key, *args, **kw)
    monkeypatch.setitem(prefix_cache.AttentionInterface._global_mapping, 'grouped', wrong)
    assert answers.slow_because(model) is None and model in prefix_cache._UNGROUPED
    assert answer(model, processor, images, asked, 6) == want


def test_an_empty_question_is_refused():
    "It would be answered as if it were the question before it in its row."
    model, processor = grouped('llama')
    cache = prefix_cache.read_prefixes(model, [[5, 6, 7]], [[]])
    own = lambda: prefix_cache.cache_rows(cache, [0])
    for questions in ([[8, 9], []], [[], [8, 9]]):
        with pytest.raises(ValueError, match='has no token'): prefix_cache.decode(model, [questions], own(), {2})
    for pair in (([], [5]), ([8], [])):
        with pytest.raises(ValueError, match='has no token'): prefix_cache.reply_logprobs(model, [[([8, 9], [5]), pair]], own())


def test_a_prefix_without_an_image_is_shared():
    "Any common beginning of some prompts, here of a system turn."
    model, _ = grouped('llama')
    rng = np.random.default_rng(0)
    system, *asked = (rng.integers(10, 250, n).tolist() for n in (12, 3, 7, 1))
    shared = prefix_cache.decode(model, [asked], prefix_cache.read_prefixes(model, [system], [[]]), set(), 6)[0]
    for q, said in zip(asked, shared):
        ids = torch.tensor([system + q])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert out[0, ids.shape[1]:].tolist() == said


def test_padding_that_cannot_be_tried_is_not_taken():
    model, processor = grouped('llama')
    def with_image_only(**inputs): raise ValueError('pixel_values are missing')
    model.generate = with_image_only
    gate = prefix_cache.padding_gate(model)
    assert not gate.passed and 'ValueError' in gate.why
