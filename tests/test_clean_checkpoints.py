"What the three stages write, each with an adapter, read by people who have never heard of this library."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_med.generate.answers import answer
from llava_med.models.llava import load

REPO = Path(__file__).resolve().parents[1]
CHAIN = {'2_stage1_alignment': None, '3_stage2_tuning': '2_stage1_alignment', '3b_vqa_tuning': '3_stage2_tuning'}   # each stage starts from the model of another
ASKED = ['what kind of image is this?', 'which organ is shown?', 'describe the picture']

CLEAN = '''
import importlib.util, json, os, sys
sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, 'llava_med'))]
sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f'{getattr(f, "__module__", "")} {f}'.lower()]
assert importlib.util.find_spec('llava_med') is None, 'the library is in reach'
import torch
from PIL import Image
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
picture, asked, jobs, out = json.loads(sys.argv[1])
found = {}
for name, folder, adapter in jobs:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), AutoProcessor.from_pretrained(folder)
    if adapter: model = PeftModel.from_pretrained(model, adapter).eval()
    found[name] = []
    for q in asked:
        turn = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': q}]}]
        x = processor(images=Image.open(picture), text=processor.apply_chat_template(turn, add_generation_prompt=True), return_tensors='pt')
        with torch.no_grad(): logits, ids = model(**x).logits[0, -1], model.generate(**x, max_new_tokens=16, do_sample=False)
        found[name].append((logits, processor.decode(ids[0, x['input_ids'].shape[1]:], skip_special_tokens=True).strip()))
torch.save(found, out)
'''


@pytest.mark.slow
def test_every_stage_with_an_adapter_is_read_without_the_library(tmp_path):
    "Merged equals base with adapter, through plain transformers and peft, and both answer as this library does."
    env = {**os.environ, 'PYTHONPATH': str(REPO), 'LLAVA_MED_OUTPUTS': str(tmp_path)}
    sets = [w for s in CHAIN for k in ('lora_rank=4', 'lr=2e-3') for w in ('--set', f'{s}.{k}')]
    small = [w for k in ('n_figures=60', 'n_vqa_images=12', 'n_val_images=4', 'n_test_images=4', 'n_singles=2') for w in ('--set', f'1_data_prep.{k}')]
    done = subprocess.run([sys.executable, '-c', 'import sys; from llava_med.lab.commands import main; sys.exit(main())', 'run', 'smoke', '--only', '1', '2', '3_stage2_tuning', '3b', *sets, *small],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = tmp_path/'smoke'
    picture = str(next((run/'1_data_prep/images').glob('*.jpg')))
    jobs = []
    for step, before in CHAIN.items():
        base = run/before/'model' if before else REPO/'data/base_tiny'
        jobs += [[f'{step} merged', str(run/step/'model'), ''], [f'{step} adapter', str(base), str(run/step/'adapter')], [f'{step} base', str(base), '']]
    clean = subprocess.run([sys.executable, '-I', '-c', CLEAN, json.dumps([picture, ASKED, jobs, str(tmp_path/'found.pt')])], cwd=tmp_path, capture_output=True, text=True,
                           env={'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PATH': '', 'HOME': str(tmp_path)})
    assert clean.returncode == 0, clean.stderr[-2000:]
    found = torch.load(tmp_path/'found.pt', weights_only=True)
    for step in CHAIN:
        merged, adapter, base = (found[f'{step} {k}'] for k in ('merged', 'adapter', 'base'))
        for (a, said), (b, too), (c, _) in zip(merged, adapter, base):
            assert torch.allclose(a, b, rtol=0, atol=2e-4) and said == too, step
        assert any(not torch.allclose(a, c, atol=1e-2) for (a, _), (c, _) in zip(merged, base)), f'{step}: the adapter has learned'
        model, processor = load(run/step/'model')
        assert answer(model, processor, [picture]*len(ASKED), ASKED, max_new_tokens=16) == [said for _, said in merged], step
