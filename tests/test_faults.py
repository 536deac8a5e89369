"What a user can get wrong about models and data, met where a user meets it: in the stages' notebooks and in the command."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava_med.models.adapters import add_lora, merge_folders, save_adapter
from llava_med.lab.steps import UsageError, known_name
from llava_med.models.llava import load
from llava_med.train.loop import Stage

REPO = Path(__file__).resolve().parents[1]
BASE = REPO/'data/base_tiny'


def talk(i, question='<image>\nwhat is it?', **more):
    return {'id': f'r{i}', 'image': f'{i % 4}.png', 'conversations': [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': 'a nodule'}], **more}


def item(i, split):
    return dict(id=f'q{i}', images=[f'{i % 4}.png'], question='what is it?', answer='a nodule', answer_type='OPEN', options=None, tags={}, split=split,
                regions=[], twin_of=None, source='drawn')


@pytest.fixture
def run(tmp_path, monkeypatch):
    "The folder of a run whose first step has left a few records."
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path/'outputs'))
    d = tmp_path/'outputs/r/1_data_prep'
    (d/'images').mkdir(parents=True); (d/'vqa').mkdir()
    for i in range(4): Image.new('RGB', (96, 96), (60*i, 90, 30)).save(d/f'images/{i}.png')
    for name in ('alignment', 'instruct'): (d/f'{name}.json').write_text(json.dumps([talk(i) for i in range(12)]))
    for s in ('train', 'val'): (d/f'vqa/{s}.json').write_text(json.dumps([item(i, s) for i in range(8)]))
    (d/'ledger.json').write_text('{}')
    return tmp_path/'outputs/r'


def first_error(step, **parameters):
    "Execute a pipeline notebook's cells in this process up to the first that fails; what it says."
    import matplotlib; matplotlib.use('Agg')
    ns = {'__name__': 'notebook', 'display': lambda *a: None}
    for cell in nbformat.read(REPO/f'nbs/pipeline/{step}.ipynb', 4).cells:
        if cell.cell_type != 'code': continue
        try: exec(compile(cell.source, step, 'exec'), ns)
        except Exception as e: return f'{type(e).__name__}: {e}'
        if 'parameters' in cell.metadata.get('tags', []): ns.update(dict(run='r', inputs_from='r', device='cpu', threads=1, **parameters))
    return ''


def copied(tmp_path, change):
    "The shipped base with one thing changed."
    folder = shutil.copytree(BASE, tmp_path/'changed')
    change(folder)
    return folder


def edit(name, **values):
    def change(folder):
        d = json.loads((folder/name).read_text())
        (folder/name).write_text(json.dumps({**d, **values}))
    return change


def other_size(folder):
    d = json.loads((folder/'config.json').read_text())
    d['vision_config']['image_size'] = 48
    (folder/'config.json').write_text(json.dumps(d))


def other_vocabulary(folder):
    d = json.loads((folder/'config.json').read_text())
    d['text_config']['vocab_size'] += 64
    (folder/'config.json').write_text(json.dumps(d))


def other_grid(folder):
    d = json.loads((folder/'processor_config.json').read_text())
    (folder/'processor_config.json').write_text(json.dumps({**d, 'patch_size': 24}))


def no_image_token(folder):
    text = (folder/'tokenizer.json').read_text().replace('<image>', '<picture>')
    (folder/'tokenizer.json').write_text(text)
    for f in ('tokenizer_config.json', 'special_tokens_map.json', 'processor_config.json'):
        if (folder/f).exists(): (folder/f).write_text((folder/f).read_text().replace('<image>', '<picture>'))


def text_only(folder):
    shutil.rmtree(folder)
    LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)).save_pretrained(folder)


def strange_weights(folder):
    state = load_file(folder/'model.safetensors')
    save_file({**state, 'model.value_head.weight': torch.zeros(2)}, folder/'model.safetensors', {'format': 'pt'})


def only_adapter(folder):
    shutil.rmtree(folder); folder.mkdir()
    (folder/'adapter_config.json').write_text('{}')


MODELS = {'size': (other_size, '64 tokens from 96 px in patches of 12, the configuration says'), 'vocabulary': (other_vocabulary, 'its weights have other shapes than its config.json says'), 'grid': (other_grid, 'px in patches of 24'), 'no image token': (no_image_token, 'the tokenizer has no <image>'),
          'text only': (text_only, "of type 'llama', not 'llava'"), 'original layout': (edit('config.json', mm_vision_tower='openai/clip'), 'llava-med convert'),
          'strange weights': (strange_weights, 'fit nothing: model.value_head.weight'), 'adapter': (only_adapter, 'is an adapter and no model by itself'),
          'empty folder': (lambda f: [p.unlink() for p in f.iterdir()], 'it holds no config.json')}


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('step, name', [('2_stage1_alignment', 'base_model'), ('3_stage2_tuning', 'start_from'), ('3b_vqa_tuning', 'start_from')])
def test_a_model_that_is_none(run, tmp_path, kind, step, name):
    change, says = MODELS[kind]
    folder = copied(tmp_path, change)
    said = first_error(step, **{name: str(folder)})
    assert says in said and str(folder) in said and '\n' not in said, said


@pytest.mark.parametrize('step, file', [('2_stage1_alignment', 'alignment.json'), ('3_stage2_tuning', 'instruct.json')])
@pytest.mark.parametrize('record, says', [
    (talk(7, '<image>\n<image>\nwhat is it?'), "record 8 ('r7') has <image> 2 times in its first question"),
    (talk(7, image=['0.png', '1.png']), "record 8 ('r7') names 2 images"),
    (talk(7, 'what is it?'), "record 8 ('r7') has <image> 0 times"),
    (talk(7, image=None), "record 8 ('r7') says <image> but names no 'image'")])
def test_markers_and_images_that_do_not_agree(run, step, file, record, says):
    path = run/'1_data_prep'/file
    records = json.loads(path.read_text()); records[7] = record
    path.write_text(json.dumps(records))
    said = first_error(step, **{'base_model' if step.startswith('2') else 'start_from': str(BASE)})
    assert says in said and str(path) in said and '\n' not in said, said


def test_items_of_two_images_are_counted_and_named(run):
    for s in ('train', 'val'): (run/f'1_data_prep/vqa/{s}.json').write_text(json.dumps([{**item(i, s), 'images': ['0.png', '1.png']} for i in range(8)]))
    said = first_error('3b_vqa_tuning', start_from=str(BASE))
    assert "none of 16 questions can be trained on (16 not one image)" in said and '\n' not in said, said


@pytest.mark.parametrize('values, says', [
    (dict(gradient_checkpointing='yes'), "gradient_checkpointing is 'yes'; known: auto, on, off."), (dict(sharding='zero3', nproc=2), "sharding is 'zero3'; known: none, fsdp."),
    (dict(max_tokens_per_microbatch=20), 'more than 20 at once; raise that or lower max_len'), (dict(lora_rank=-1), 'rank -1'), (dict(nproc=0), 'nproc is 0'),
    (dict(patience=2, n_val=0), 'patience is 2'), (dict(max_len=30), 'The image does not fit into max_len = 30 tokens')])
def test_a_way_of_training_that_there_is_not(run, values, says):
    said = first_error('3_stage2_tuning', start_from=str(BASE), n_show=1, **values)
    assert says in said and '\n' not in said, said


def test_the_number_of_a_step_is_enough():
    assert [known_name(w, ['3_stage2_tuning', '3b_vqa_tuning'], 'step', prefix=True) for w in ('3', '3b', '3_st')] == ['3_stage2_tuning', '3b_vqa_tuning', '3_stage2_tuning']
    with pytest.raises(UsageError, match="no step named '4'"): known_name('4', ['3_stage2_tuning', '3b_vqa_tuning'], 'step', prefix=True)


def test_a_part_that_there_is_not():
    with pytest.raises(ValueError, match="stage1: there is no trainable pattern named 'head'.*projector"): Stage('stage1', ('projector', 'head'), 1e-3)
    with pytest.raises(ValueError, match='a rate for .*language_model'): Stage('stage1', ('projector',), 1e-3, learning_rates={'language_model': 1e-5})


def test_an_adapter_of_another_stage_is_refused(tmp_path):
    model, processor = load(BASE)
    adapted = add_lora(model, 2)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad: p.add_(.01)
    save_adapter(adapted, tmp_path/'adapter')
    merge_folders(BASE, tmp_path/'adapter', tmp_path/'next')
    with pytest.raises(ValueError, match='trained on another base') as e: merge_folders(tmp_path/'next', tmp_path/'adapter', tmp_path/'twice')
    assert str(tmp_path/'adapter') in str(e.value) and 'base_tiny' in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path/'twice').exists()


@pytest.mark.slow
def test_the_command_says_it_in_one_sentence(run, tmp_path):
    folder = copied(tmp_path, text_only)
    env = {**os.environ, 'PYTHONPATH': str(REPO)}
    done = subprocess.run([sys.executable, '-c', 'import sys; from llava_med.lab.commands import main; sys.exit(main())', 'run', 'smoke', '--name', 'r', '--only', '3',
                           '--set', f'3_stage2_tuning.start_from={folder}'], env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and f"'{folder}' is a model of type 'llama', not 'llava'" in last and 'Traceback' not in done.stderr, done.stderr
