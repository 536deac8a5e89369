"Adapters of other people: older layouts, pickles, everything that peft can put into them, and what does not fit."
import json
import re

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from llava_med.models.adapters import attach, load_adapter, merge, save_adapter
from llava_med.models.llava import load, save, tiny_model

logging.set_verbosity_error()
IDS = torch.arange(5, 40)[None]
FRONT = 'base_model.model.'


def logits(model):
    with torch.no_grad(): return model(input_ids=IDS).logits


def moved(adapted, seed=0):
    "Every tensor of an adapter moved, so that none is silent."
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p)*.1)
    return adapted.eval()


def base(): return tiny_model()[0]


def made(tmp_path, **config):
    "An adapter as peft itself saves it, without our record, and what it does."
    kw = dict(r=4, lora_alpha=8, target_modules=r'.*language_model.*\.(q_proj|v_proj|down_proj)', task_type='CAUSAL_LM')
    adapted = moved(attach(base(), LoraConfig(**(kw | config))))
    adapted.save_pretrained(tmp_path/'a', save_embedding_layers=False)
    return tmp_path/'a', logits(adapted)


def old(name):
    "A name of this version → that of transformers before 4.52."
    name = re.sub(r'^base_model\.model\.model\.language_model\.', FRONT + 'language_model.model.', name)
    name = re.sub(r'^base_model\.model\.lm_head', FRONT + 'language_model.lm_head', name)
    name = re.sub(r'^base_model\.model\.model\.vision_tower\.(vision_model\.)?', FRONT + 'vision_tower.vision_model.', name)
    return re.sub(r'^base_model\.model\.model\.multi_modal_projector', FRONT + 'multi_modal_projector', name)


def rewritten(path, name=lambda n: n, kind='safetensors', **config):
    "The same adapter under other names, as another file, with another configuration."
    f = path/'adapter_model.safetensors'
    state = {name(n): v for n, v in load_file(f).items()}
    f.unlink()
    save_file(state, f) if kind == 'safetensors' else torch.save(state, path/'adapter_model.bin')
    said = json.loads((path/'adapter_config.json').read_text())
    (path/'adapter_config.json').write_text(json.dumps({**said, **config}))
    return path


LANGUAGE = ['q_proj', 'v_proj', 'down_proj']
CASES = {'plain': {}, 'rslora': dict(use_rslora=True), 'dora': dict(use_dora=True), 'projector': dict(modules_to_save=['multi_modal_projector']),
         'head': dict(modules_to_save=['lm_head']), 'ranks': dict(rank_pattern={'language_model.layers.0.mlp.down_proj': 2}),
         'alphas': dict(alpha_pattern={'language_model.layers.1.self_attn.q_proj': 32}), 'some layers': dict(target_modules=['q_proj', 'v_proj'], layers_to_transform=[1], layers_pattern='layers'),
         'tower as well': dict(target_modules=['q_proj', 'v_proj', 'fc1']), 'embedding': dict(target_modules=r'.*language_model.*\.(q_proj|embed_tokens)'), 'bias': dict(bias='lora_only')}


@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
@pytest.mark.parametrize('layout', ['new', 'old'])
@pytest.mark.parametrize('case', CASES)
def test_what_peft_saves_does_what_it_did(case, layout, kind, tmp_path):
    path, want = made(tmp_path, **CASES[case])
    change = {}
    if layout == 'old':
        if case == 'alphas': change = dict(alpha_pattern={'language_model.model.layers.1.self_attn.q_proj': 32})
        elif case == 'ranks': change = dict(rank_pattern={'language_model.model.layers.0.mlp.down_proj': 2})
        elif case == 'plain': change = dict(target_modules=r'^language_model\.model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|v_proj|down_proj)$')
    rewritten(path, old if layout == 'old' else lambda n: n, kind, **change)
    adapted = load_adapter(base(), path)
    assert torch.equal(logits(adapted), want) and not torch.allclose(want, logits(base()), atol=1e-2)
    merged, processor = merge(adapted), tiny_model()[1]
    assert torch.allclose(logits(merged), want, atol=1e-5)
    again = load(save(merged, processor, tmp_path/'m'))[0]
    assert torch.allclose(logits(again), want, atol=1e-5)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == (case not in ('head', 'embedding')), 'tied, unless the adapter changed one of the two'


def test_an_older_adapter_is_trained_and_saved_in_this_layout(tmp_path):
    path, want = made(tmp_path, modules_to_save=['multi_modal_projector'])
    adapted = load_adapter(base(), rewritten(path, old, 'bin'), trainable=True)
    assert [p for p in adapted.parameters() if p.requires_grad]
    save_adapter(adapted, tmp_path/'b')
    assert all(n.startswith(FRONT + 'model.') for n in load_file(tmp_path/'b/adapter_model.safetensors'))
    assert torch.equal(logits(load_adapter(base(), tmp_path/'b')), want)


def test_an_adapter_of_a_bare_language_model(tmp_path):
    path, want = made(tmp_path)
    rewritten(path, lambda n: n.replace('.model.language_model.', '.model.'), target_modules=LANGUAGE)
    assert torch.equal(logits(load_adapter(base(), path)), want)


def test_names_without_the_beginning_of_peft(tmp_path):
    path, want = made(tmp_path)
    assert torch.equal(logits(load_adapter(base(), rewritten(path, lambda n: n.removeprefix(FRONT)))), want)


@pytest.mark.parametrize('name', [lambda n: n.replace('language_model', 'text_model'), lambda n: n.replace('layers.1.', 'layers.7.'),
                                  lambda n: n.replace('.q_proj', '.query'), lambda n: 'module.' + n,
                                  lambda n: n.replace('lora_A', 'lora_C')])
def test_names_that_match_nothing_or_only_partly_are_refused(name, tmp_path):
    path, _ = made(tmp_path)
    with pytest.raises(ValueError, match='does not fit this model.*(lora|language)') as e: load_adapter(base(), rewritten(path, name))
    assert '\n' not in str(e.value) and str(path) in str(e.value)


@pytest.mark.parametrize('change', [dict(target_modules=['c_attn']), dict(target_modules='nothing'), dict(modules_to_save=['mm_projector']),
                                    dict(target_modules=['q_proj']), dict(r=2), dict(peft_type='NEW')])
def test_a_configuration_that_does_not_fit_its_weights(change, tmp_path):
    path, _ = made(tmp_path, **({} if 'modules_to_save' not in change else dict(modules_to_save=['multi_modal_projector'])))
    with pytest.raises(ValueError, match='does not fit this model'): load_adapter(base(), rewritten(path, **change))


def test_embeddings_of_another_number_of_tokens(tmp_path):
    path, want = made(tmp_path)
    f = path/'adapter_model.safetensors'
    state, embed = load_file(f), base().get_input_embeddings().weight.detach().clone()
    for name in ('model.language_model.embed_tokens.weight', 'model.language_model.embed_tokens.base_layer.weight', 'language_model.model.embed_tokens.weight'):
        save_file({**state, FRONT + name: torch.cat([embed, embed[:2]])}, f)
        with pytest.raises(ValueError, match=f'has {len(embed) + 2} rows and the base has {len(embed)}.*tokenizer'): load_adapter(base(), path)
        save_file({**state, FRONT + name: embed*2}, f)
        with pytest.raises(ValueError, match="with other values than the base's"): load_adapter(base(), path)
        save_file({**state, FRONT + name: embed}, f)
        assert torch.equal(logits(load_adapter(base(), path)), want)


def test_files_that_are_no_adapter(tmp_path):
    path, _ = made(tmp_path)
    f = path/'adapter_model.safetensors'
    good = f.read_bytes()
    f.write_bytes(good[:500])
    with pytest.raises(ValueError, match='adapter_model.safetensors.* is damaged'): load_adapter(base(), path)
    save_file({}, f)
    with pytest.raises(ValueError, match='holds no weights'): load_adapter(base(), path)
    f.unlink()
    with pytest.raises(FileNotFoundError, match='neither adapter_model.safetensors nor adapter_model.bin'): load_adapter(base(), path)

    class Bomb:
        def __reduce__(self): return (type(tmp_path).touch, (tmp_path/'ran',))
    torch.save({'x': Bomb()}, path/'adapter_model.bin')
    with pytest.raises(ValueError, match='holds more than tensors'): load_adapter(base(), path)
    assert not (tmp_path/'ran').exists()
    (path/'adapter_model.bin').write_bytes(b'PK')
    with pytest.raises(ValueError, match='is damaged|more than tensors'): load_adapter(base(), path)
    f.write_bytes(good); (path/'adapter_model.bin').unlink(); torch.save({}, path/'non_lora_trainables.bin')
    with pytest.raises(ValueError, match='non_lora_trainables.bin; merge it'): load_adapter(base(), path)
