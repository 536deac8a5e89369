"Drawn answers: the same on both paths and in any batch, greedy at temperature 0, with the model's own log-probabilities."
import numpy as np
import pytest
import torch
from PIL import Image

from llava_med.core.registry import UnknownName
from llava_med.generate import sampling
from llava_med.generate.answers import answer
from llava_med.generate.prefix_cache import chat
from llava_med.generate.sampling import PROCESSORS, ban, draw, sample
from llava_med.models.adapters import add_lora
from llava_med.models.llava import tiny_model


@pytest.fixture(scope='module')
def loud():
    model, processor = tiny_model(width=64)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1: p.data.mul_(8)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight)*.3)
    return model, processor


def picture(seed): return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 96, 3), dtype=np.uint8))


IMAGES = [picture(0), None, [picture(0), picture(1)], picture(1), picture(0)]
PROMPTS = ['left?', 'what is a lung?', 'which of the two?', 'left?', 'is there a small nodule?']


def ids(said): return [[a['ids'] for a in qs] for qs in said]


def plainly(monkeypatch): monkeypatch.setattr(sampling, 'slow_because', lambda model: 'the test says so')


@pytest.mark.parametrize('how', [dict(), dict(temperature=2., top_p=.7), dict(temperature=0), dict(processors={'no_repeat_ngram': {'size': 1}, 'repetition_penalty': None})])
def test_both_paths_draw_the_same(how, loud, monkeypatch):
    how = dict(n=3, max_new_tokens=6, logprobs=True, seed=5, **how)
    fast = sample(*loud, IMAGES, PROMPTS, **how)
    plainly(monkeypatch)
    plain = sample(*loud, IMAGES, PROMPTS, **how)
    assert ids(fast) == ids(plain)
    for a, b in zip((a for qs in fast for a in qs), (a for qs in plain for a in qs)):
        assert a['ended'] == b['ended'] and a['text'] == b['text'] and len(a['logprobs']) == len(a['ids']) + a['ended']
        assert np.allclose(a['logprobs'], b['logprobs'], atol=1e-4)


@pytest.mark.parametrize('plain', [False, True])
def test_temperature_0_is_answer(plain, loud, monkeypatch):
    want = answer(*loud, IMAGES, PROMPTS, max_new_tokens=8)
    if plain: plainly(monkeypatch)
    assert [a['text'] for qs in sample(*loud, IMAGES, PROMPTS, temperature=0, max_new_tokens=8) for a in qs] == want


def test_neither_batch_size_nor_n_nor_later_prompts_change_an_answer(loud):
    want = ids(sample(*loud, IMAGES, PROMPTS, n=4, max_new_tokens=6))
    for size in (1, 3, 200): assert ids(sample(*loud, IMAGES, PROMPTS, n=4, max_new_tokens=6, batch_size=size)) == want
    assert ids(sample(*loud, IMAGES[:2], PROMPTS[:2], n=2, max_new_tokens=6)) == [qs[:2] for qs in want[:2]]
    assert ids(sample(*loud, IMAGES, PROMPTS, n=4, max_new_tokens=6, seed=1)) != want
    assert len({tuple(a) for a in want[0]}) > 1, 'answers to one prompt differ'


def plain_logprobs(model, processor, image, question, said):
    x = processor(images=image, text=chat(processor, question), return_tensors='pt', add_special_tokens=False)
    whole = torch.cat([x['input_ids'], torch.tensor([said])], 1)
    with torch.inference_mode(): logits = model(input_ids=whole, pixel_values=x['pixel_values']).logits[0]
    return logits[-len(said) - 1:-1].float().log_softmax(-1)[range(len(said)), said].tolist()


@pytest.mark.parametrize('penalty', [None, 3.])
def test_logprobs_are_the_models_own(penalty, loud):
    model, processor = loud
    end = processor.tokenizer.eos_token_id
    model.generation_config.repetition_penalty = penalty      # which generate applies before our function sees the scores
    try:
        for a in sample(model, processor, [IMAGES[0]], ['left?'], n=6, temperature=.8, top_p=.9, max_new_tokens=8, logprobs=True)[0]:
            assert np.allclose(a['logprobs'], plain_logprobs(model, processor, IMAGES[0], 'left?', a['ids'] + [end]*a['ended']), atol=1e-4)
        if penalty:
            want = answer(model, processor, IMAGES[:1], PROMPTS[:1], max_new_tokens=8)
            assert sample(model, processor, IMAGES[:1], PROMPTS[:1], temperature=0, max_new_tokens=8)[0][0]['text'] == want[0]
    finally: model.generation_config.repetition_penalty = None


def test_shares_are_the_probabilities(loud):
    model, processor = loud
    x = processor(images=IMAGES[0], text=chat(processor, 'left?'), return_tensors='pt', add_special_tokens=False)
    with torch.inference_mode(): probs = model(**x).logits[0, -1].softmax(-1).numpy()
    first = [(a['ids'] or [processor.tokenizer.eos_token_id])[0] for a in sample(model, processor, [IMAGES[0]], ['left?'], n=3000, max_new_tokens=1, batch_size=500)[0]]
    shares = np.bincount(first, minlength=len(probs))/3000
    assert np.abs(shares - probs).max() < 4*.5/3000**.5


def test_top_p_keeps_the_fewest_tokens_that_hold_it():
    logits = torch.tensor([[.1, .4, .3, .2]]).log().expand(2000, -1)
    numbers = torch.linspace(0, .9999, 2000)
    for p, kept in ((.4, {1}), (.41, {1, 2}), (.7, {1, 2}), (.71, {1, 2, 3}), (1., {0, 1, 2, 3})):
        assert set(draw(logits, numbers, 1., p - 1e-6 if p in (.4, .7) else p).tolist()) == kept


def test_an_end_is_drawn_and_counted_and_the_image_token_never(loud):
    model, processor = loud
    end, image = processor.tokenizer.eos_token_id, model.config.image_token_id
    only = lambda *keep: lambda said, logits: logits.masked_fill(~torch.isin(torch.arange(len(logits)), torch.tensor(keep)), -torch.inf)
    ended = sample(model, processor, [IMAGES[0]], ['left?'], n=2, processors=[only(end)], logprobs=True)[0]
    assert all(a['ended'] and a['ids'] == [] and len(a['logprobs']) == 1 for a in ended)
    never = sample(model, processor, [IMAGES[0]], ['left?'], n=20, processors=[only(7, image)], max_new_tokens=3)[0]
    assert all(a['ids'] == [7]*3 and not a['ended'] for a in never)
    with pytest.raises(ValueError, match='forbid every token'): sample(model, processor, [IMAGES[0]], ['left?'], processors=[only(image)])


def test_an_adapter_and_training_mode_stay(loud):
    adapted = add_lora(tiny_model()[0], 2).train()
    sample(adapted, loud[1], IMAGES[:1], PROMPTS[:1], n=2, max_new_tokens=2)
    assert adapted.training


@pytest.mark.parametrize('how, words', [(dict(n=0), 'n = 0'), (dict(temperature=-1), 'temperature = -1'), (dict(top_p=1.5), 'top_p = 1.5'),
                                        (dict(processors={'ban': {'id': [1]}}), "'ban' cannot be made"), (dict(max_new_tokens=0), 'max_new_tokens = 0')])
def test_bad_settings_are_refused(how, words, loud):
    with pytest.raises(ValueError, match=words): sample(*loud, IMAGES[:1], PROMPTS[:1], **how)


def test_an_unknown_processor_is_refused_with_the_known_ones(loud):
    with pytest.raises(UnknownName, match='no logits processor named .bam.*Did you mean ban.*Known: ban, no_repeat_ngram, repetition_penalty'):
        sample(*loud, IMAGES[:1], PROMPTS[:1], processors={'bam': {}})
    assert set(PROCESSORS) == {'ban', 'no_repeat_ngram', 'repetition_penalty'} and ban([])([], torch.ones(3)).tolist() == [1, 1, 1]


def test_a_template_that_leaves_the_beginning_to_the_tokenizer(loud, monkeypatch):
    model, processor = loud
    import copy
    processor = copy.deepcopy(processor)
    processor.chat_template = processor.tokenizer.chat_template = processor.chat_template.replace('{{ bos_token }}', '')
    fast = sample(model, processor, IMAGES, PROMPTS, n=2, max_new_tokens=4)
    plainly(monkeypatch)
    assert ids(sample(model, processor, IMAGES, PROMPTS, n=2, max_new_tokens=4)) == ids(fast)
