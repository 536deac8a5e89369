"The memory plan: what it counts, what it refuses, and its total against the measured peak of one and of two processes."
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_med.models.anatomy import set_trainable
from llava_med.models.llava import assemble, make_processor, tiny_model, train_tokenizer
from llava_med.train.batches import Collator, batch_loss, encode
from llava_med.train.loop import Stage, fit, has_bf16
from llava_med.train.memory import activation_bytes, checkpointed, plan_memory, state_bytes, step_bytes

PARTS = ('projector', 'language_model')


def encoded(tok, n, words=(6,), turn='what is it?', width=32, patches=4):
    "Samples whose answers have as many repetitions as `words` says, and their collator."
    def one(k):
        user = [dict(type='image'), dict(type='text', text=turn)]
        chat = [dict(role='user', content=user), dict(role='assistant', content='a small nodule '*k)]
        return dict(encode(tok, chat, patches), image=0)
    return [one(words[i % len(words)]) for i in range(n)], Collator(tok.pad_token_id, torch.randn(1, patches, width))


@pytest.fixture(scope='module')
def toy():
    model, processor = tiny_model(image_size=24)
    set_trainable(model, PARTS)
    return model, *encoded(processor.tokenizer, 8)


def test_the_peak_counts_what_the_backward_pass_makes(toy):
    model, samples, collate = toy
    batch = collate(samples)
    kept, peak = step_bytes(model.train(), batch)
    assert kept >= .95*activation_bytes(model, batch)
    assert peak > 1.1*kept


def test_measuring_leaves_gradients_mode_and_random_numbers_alone(toy):
    model, samples, collate = toy
    p = next(p for p in model.parameters() if p.requires_grad)
    p.grad = torch.ones_like(p)
    model.eval()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    plan_memory(model, samples, collate, free=2**30)
    assert torch.rand(1) == expected and bool((p.grad == 1).all()) and not model.training
    p.grad = None


def test_every_process_is_counted(toy):
    model, samples, collate = toy
    one = plan_memory(model, samples, collate, free=2**30)
    two = plan_memory(model, samples, collate, free=2**30, helpers=2)
    assert two.tokens < one.tokens/2 and two.total() <= 2**30
    assert two.total(100) > one.total(100) + 300*2**20      # a helper has an interpreter
    assert 'each of 2 processes' in str(two) and 'processes' not in str(one)
    launched = plan_memory(model, samples, collate, free=2**31, helpers=2, launched=True)
    assert launched.total(100) > two.total(100)


def test_no_batch_lies_more_than_a_tenth_above_the_line(toy):
    model, _, collate = toy
    tok = tiny_model(image_size=24)[1].tokenizer
    for gradient_checkpointing in ('off', 'on'):
        samples, _ = encoded(tok, 8, (1, 20, 9, 14))
        plan = plan_memory(model, samples, collate, gradient_checkpointing, free=2**30)
        for rows in (samples[1:2], samples, samples[1::4]*6, samples[2::4]*3):
            batch = collate(rows)
            from llava_med.train.memory import checkpointed
            with checkpointed(model.train(), plan.gradient_checkpointing): _, peak = step_bytes(model, batch)
            assert peak <= 1.1*(plan.fixed + plan.per_token*batch['input_ids'].numel())


def test_what_may_not_be_divided_must_fit(toy):
    model, samples, collate = toy
    plan = plan_memory(model, samples, collate, free=2**30, least=300)
    with pytest.raises(ValueError, match='may not be divided.*batch_size'):
        plan_memory(model, samples, collate, 'off', free=plan.total(200), least=300)
    with pytest.raises(ValueError, match='may not be divided'):
        plan_memory(model, samples, collate, tokens=200, free=2**30, least=300)
    with pytest.raises(ValueError, match='2 processes.*fewer processes'):
        plan_memory(model, samples, collate, free=2**28, helpers=2)


def test_modules_and_a_loss_with_logs_count(toy):
    model, samples, collate = toy
    head = torch.nn.Linear(1000, 1000)
    loss = lambda m, b: (*batch_loss(m, b), {'more': 1.})
    plain = plan_memory(model, samples, collate, free=2**30, loss=loss)
    with_head = plan_memory(model, samples, collate, free=2**30, loss=loss, modules=(head,))
    assert with_head.state - plain.state == 12*1001000
    head.requires_grad_(False)
    frozen = plan_memory(model, samples, collate, free=2**30, loss=loss, modules=(head,), helpers=2)
    assert frozen.state == plain.state and frozen.each_more >= 350*2**20 + 4*1001000
    assert state_bytes(model, best=True)*3 == state_bytes(model)*4


def trial(processes, bf16):
    "Plans and trains a model of 135 million parameters; another process looks at its memory."
    torch.set_num_threads(1)
    processor = make_processor(train_tokenizer(['a small nodule in the left lung'], 300), 24, 12)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                              image_size=24, patch_size=12, projection_dim=32)
    text = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                       num_key_value_heads=3, tie_word_embeddings=True, vocab_size=49152)
    model = assemble(vision, text, processor)
    set_trainable(model, PARTS)
    samples, collate = encoded(processor.tokenizer, 4*processes, (12,), 'a small nodule '*12)
    print('ready', flush=True)
    input()
    plan = plan_memory(model, samples, collate, tokens=128, bf16=bf16, free=2**34, helpers=processes)
    print('planned', plan.total(), flush=True)
    stage = Stage('trial', PARTS, 1e-4, batch_size=2*processes)
    fit(model, samples, collate, stage, grad_workers=processes, memory=plan, bf16=bf16)


def tree(pid):
    "A process and all below it."
    children = Path(f'/proc/{pid}/task/{pid}/children')
    below = children.read_text().split() if children.exists() else []
    return [pid, *(q for c in below for q in tree(int(c)))]


def proportional(pid):
    "Bytes of a process, what it shares divided by those who share it; 0 when it is gone."
    try: text = Path(f'/proc/{pid}/smaps_rollup').read_text()
    except OSError: return 0
    return sum(int(l.split()[1]) for l in text.splitlines() if l.startswith('Pss:'))*1024


def measured(processes, bf16):
    "Planned bytes, and by how much the memory of all processes grew at most."
    code = f'import test_memory; test_memory.trial({processes}, {bf16})'
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         env=env, cwd=Path(__file__).parent)
    try:
        assert p.stdout.readline() == 'ready\n'
        before = peak = proportional(p.pid)
        p.stdin.write('\n'); p.stdin.flush()
        while p.poll() is None:
            peak = max(peak, sum(map(proportional, tree(p.pid))))
            time.sleep(.1)
        assert p.returncode == 0
        return int(p.stdout.read().split()[1]), peak - before
    finally: p.kill(); p.wait()


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='needs /proc, as on Linux')
@pytest.mark.parametrize('processes,bf16', [(1, False), (2, False), (1, True), (2, True)])
def test_the_plan_meets_the_measured_peak(processes, bf16):
    if bf16 and not has_bf16('cpu'): pytest.skip('this processor has no bfloat16')
    planned, grown = measured(processes, bf16)
    print(f'{processes} processes, bf16 {bf16}: planned {planned/2**20:.0f} MiB, grown {grown/2**20:.0f}')
    assert .75 < planned/grown < 1.25
