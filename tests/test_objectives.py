"What a chapter can't show of objectives: whole batches over processes, checkpoints of another loss, samples that the model makes."
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llava_med.models.llava import tiny_model
from llava_med.train.batches import Collator, batch_loss, encode
from llava_med.train.launch import launch
from llava_med.train.loop import Stage, fit
from llava_med.train.memory import MemoryPlan
from llava_med.train.monitor import ProgressLines
from llava_med.train.objectives import Objective, as_objective

CODE = '''
import torch
from torch.nn import functional as F
from llava_med.train.objectives import Objective, gather_rows

class InBatch(Objective):
    "Which text of the batch belongs to an image, and the other way round."
    unit = 'batch'
    def __init__(self, gathers): self.gathers = gathers
    def loss(self, model, batch):
        inner = model.model
        images = F.normalize(inner.multi_modal_projector(batch['features'].float()).mean(1), dim=-1)
        texts = F.normalize(model.get_input_embeddings()(batch['input_ids']).mean(1), dim=-1)
        first = 0
        all_images, all_texts = images, texts
        if self.gathers: (all_images, first), (all_texts, _) = gather_rows(images), gather_rows(texts)
        own = torch.arange(first, first + len(images))
        total = sum(F.cross_entropy(a @ b.T/.1, own, reduction='sum')
                    for a, b in ((images, all_texts), (texts, all_images)))
        return total, len(images), dict(rows=len(images))
'''


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    "A module with a contrastive objective, which other processes can import."
    folder = tmp_path_factory.mktemp('recipe')
    (folder/'contrastive_recipe.py').write_text(CODE)
    sys.path.insert(0, str(folder))
    import contrastive_recipe
    yield contrastive_recipe, folder
    sys.path.remove(str(folder))


@pytest.fixture(scope='module')
def toy():
    "Eight samples of one length with an image each, and their collator."
    model, processor = tiny_model(image_size=24)
    tok, n = processor.tokenizer, model.config.image_seq_length
    words = 'left right top bottom none one two three'.split()
    def chat(w): return [dict(role='user', content=[dict(type='image'), dict(type='text', text='where?')]), dict(role='assistant', content=w)]
    samples = [dict(encode(tok, chat(w), n), image=i) for i, w in enumerate(words)]
    features = torch.randn(8, n, model.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(0))
    return samples, Collator(tok.pad_token_id, features)


STAGE = Stage('contrast', ('projector',), 1e-2, epochs=2, batch_size=8, optimizer='sgd', max_grad_norm=1e9)


def trained(toy, objective, **how):
    "Losses and weights after two steps."
    model = tiny_model(image_size=24)[0]
    rows = fit(model, *toy, STAGE, objective=objective, **how)
    return [r['loss'] for r in rows], [p.detach().clone() for p in model.model.multi_modal_projector.parameters()]


def same(a, b):
    "Losses equal to 1e-5, and weights as after steps of SGD with gradients that are equal to 1e-5, up to the weights' own rounding."
    assert max(abs(x - y) for x, y in zip(a[0], b[0])) < 2e-5, (a[0], b[0])
    for x, y, start in zip(a[1], b[1], tiny_model(image_size=24)[0].model.multi_modal_projector.parameters()):
        assert (x - y).norm() < 1e-5*(x - start).norm() + 1e-7*x.norm()


def test_a_loss_of_the_whole_batch_is_never_divided(toy, recipe):
    objective = recipe[0].InBatch(False)
    whole = trained(toy, objective)
    most = max(len(s['input_ids']) for s in toy[0])*8
    for tokens in (most, most + 100): same(whole, trained(toy, objective, memory=MemoryPlan(tokens, False, 0, 0, 0)))
    with pytest.raises(ValueError, match='A batch of this objective has .* may not be divided, but only'):
        trained(toy, objective, memory=MemoryPlan(most - 1, False, 0, 0, 0))
    with pytest.raises(ValueError, match='InBatch.* is a loss of the whole batch, which helper processes cannot share'):
        trained(toy, objective, grad_workers=2)
    loose = lambda model, batch: objective.loss(model, batch)[:2]   # a function that says nothing of its unit
    same(whole, trained(toy, loose))
    with pytest.raises(ValueError, match='whole batch'): trained(toy, loose, grad_workers=2)


@pytest.mark.parametrize('gathers', [False, True])
def test_two_processes_end_as_one_with_a_loss_of_the_whole_batch(toy, recipe, gathers, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(recipe[1]))
    whole = trained(toy, recipe[0].InBatch(gathers))
    model = tiny_model(image_size=24)[0]
    rows = launch(2, tmp_path/'job', model, *toy, STAGE, objective=recipe[0].InBatch(gathers))
    same(whole, ([r['loss'] for r in rows], list(model.model.multi_modal_projector.parameters())))
    assert [r['rows'] for r in rows] == [1., 1.]   # logged sums are divided like the loss


class Stop(Exception): pass


def stopped_at(step):
    def stop(row):
        if row['step'] == step: raise Stop
    return stop


def double(model, batch):
    "Another loss of the same batches."
    total, n = batch_loss(model, batch)
    return 2*total, n

double.unit = 'row'


def test_a_checkpoint_of_another_objective_is_not_taken(toy, tmp_path, capsys):
    stage = Stage('stage2', ('projector', 'language_model'), 1e-2, epochs=4, batch_size=4)
    with pytest.raises(Stop): fit(tiny_model(image_size=24)[0], *toy, stage, checkpoint=tmp_path/'state', save_s=0, report=stopped_at(3))
    other, fresh = (tiny_model(image_size=24)[0] for _ in range(2))
    seen = []
    rows = fit(other, *toy, stage, checkpoint=tmp_path/'state', objective=double, report=seen.append)
    assert rows == fit(fresh, *toy, stage, objective=double) and seen[0]['step'] == 0
    assert 'made with the objective cross_entropy, not test_objectives.double' in capsys.readouterr().out
    again = fit(tiny_model(image_size=24)[0], *toy, stage, checkpoint=tmp_path/'state', objective=double, report=seen.append)
    assert again == rows and len(seen) == len(rows)   # its own is taken


class Pairwise(Objective):
    "The first of two samples of a group is to be likelier than the second; a baseline is kept beside the weights."
    unit = 'group'

    def __init__(self): self.level, self.head = torch.zeros(1), nn.Linear(1, 1)

    def modules(self): return dict(head=self.head)

    def state_dict(self): return dict(level=self.level)

    def load_state_dict(self, state): self.level = state['level'].clone()

    def collate(self, samples, collate): return dict(collate(samples), group=[s['group'] for s in samples])

    def loss(self, model, batch):
        labels = batch['labels'][:, 1:]
        logits = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits[:, :-1]
        score = -F.cross_entropy(logits.transpose(1, 2), labels, reduction='none').sum(1)
        first = [batch['group'].index(g) for g in dict.fromkeys(batch['group'])]
        second = [len(batch['group']) - 1 - batch['group'][::-1].index(g) for g in dict.fromkeys(batch['group'])]
        gap = self.head((score[first] - score[second])[:, None] - self.level)
        return -F.logsigmoid(gap).sum(), len(first), dict(gap=gap.sum().item())

    def after_step(self, model, step): self.level = self.level + .5


@pytest.fixture(scope='module')
def text_pairs():
    "Four questions without an image, with a right and a wrong answer each."
    tok = tiny_model(image_size=24)[1].tokenizer
    def chat(q, a): return [dict(role='user', content=q), dict(role='assistant', content=a)]
    samples = [dict(encode(tok, chat(f'question {i}?', a)), group=i) for i in range(4) for a in ('yes, it is', 'no')]
    return samples, Collator(tok.pad_token_id)


def test_groups_stay_together_and_an_objectives_state_is_resumed(text_pairs, tmp_path):
    stage = Stage('pairs', ('language_model',), 1e-2, epochs=3, batch_size=4, sampler='pairs')
    models = [tiny_model(image_size=24)[0] for _ in range(4)]
    def objective(): torch.manual_seed(7); return Pairwise()
    rows = fit(models[0], *text_pairs, stage, objective=objective())
    assert 'gap' in rows[0]
    least = max(len(s['input_ids']) for s in text_pairs[0])*2
    parts = fit(models[1], *text_pairs, stage, objective=objective(), memory=MemoryPlan(least, False, 0, 0, 0))
    assert max(abs(a['loss'] - b['loss']) for a, b in zip(rows, parts)) < 1e-4
    with pytest.raises(ValueError, match='A group of this objective'):
        fit(models[1], *text_pairs, stage, objective=objective(), memory=MemoryPlan(least//2, False, 0, 0, 0))
    with pytest.raises(Stop): fit(models[2], *text_pairs, stage, objective=objective(), checkpoint=tmp_path/'s', save_s=0, report=stopped_at(3))
    taken = objective()
    assert fit(models[3], *text_pairs, stage, objective=taken, checkpoint=tmp_path/'s') == rows
    assert taken.level.item() == .5*len(rows)
    for a, b in zip(models[0].parameters(), models[3].parameters()): assert torch.equal(a, b)


class Rolled(Objective):
    "Cross-entropy of samples that are made when their turn comes."
    unit = 'group'

    def rollout(self, model, samples, seed):
        assert not model.training
        return [dict(s, group=i, weights=[1 + seed % 3]*len(s['labels'])) for i, s in enumerate(samples) for _ in range(2)]

    def loss(self, model, batch): return *batch_loss(model, batch), {}


def test_samples_that_the_model_makes(toy, tmp_path):
    stage = Stage('roll', ('projector', 'language_model'), 1e-2, epochs=2, batch_size=4, sampler='rollout')
    models = [tiny_model(image_size=24)[0] for _ in range(3)]
    seen = []
    rows = fit(models[0], *toy, stage, objective=Rolled(), report=seen.append)
    assert [r['samples'] for r in rows] == [4, 8, 12, 16]
    assert all(r['tokens'] >= 8*min(len(s['input_ids']) for s in toy[0]) for r in seen)   # each prompt twice
    with pytest.raises(Stop): fit(models[1], *toy, stage, objective=Rolled(), checkpoint=tmp_path/'s', save_s=0, report=stopped_at(1))
    assert fit(models[2], *toy, stage, objective=Rolled(), checkpoint=tmp_path/'s') == rows
    for a, b in zip(models[0].parameters(), models[2].parameters()): assert torch.equal(a, b)
    with pytest.raises(NotImplementedError, match='makes no samples'): fit(models[1], *toy, stage)


@pytest.mark.parametrize('change, said', [
    (dict(objective='dpoo'), 'no objective named'), (dict(sampler='pair'), 'Did you mean pairs'),
    (dict(optimizer='adam'), 'Did you mean adamw'), (dict(schedule='cos'), 'no schedule named'),
    (dict(trainable=('tower',)), 'no trainable pattern named'), (dict(trainable=('*adapter*',)), 'fits no weight')])
def test_unknown_names_are_refused_before_anything_is_trained(toy, change, said):
    with pytest.raises(ValueError, match=said):
        fit(tiny_model(image_size=24)[0], *toy, Stage(**dict(name='odd', trainable=('projector',), lr=1e-3) | change))


def test_patterns_train_what_they_name(toy):
    for parts in (('last_block',), ('norms',), ('*self_attn.q_proj*',)):
        model, start = (tiny_model(image_size=24)[0] for _ in range(2))
        fit(model, *toy, Stage('some', parts, 1e-2, batch_size=4, learning_rates={parts[0]: 2e-2}))
        moved = {n for (n, p), q in zip(model.named_parameters(), start.parameters()) if not torch.equal(p, q)}
        inside = dict(last_block='layers.1.', norms='norm').get(parts[0], 'self_attn.q_proj')
        assert moved and all(inside in n for n in moved), moved


def test_a_long_step_is_not_silent(toy, capsys):
    "Steps of 2 s, a line at least every second."
    said = []
    class Timed(ProgressLines):
        def say(self): said.append(time.monotonic()); super().say()
    def slow(model, batch): time.sleep(1); return batch_loss(model, batch)
    slow.unit = 'row'
    start, lines = time.monotonic(), Timed(.5)
    fit(tiny_model(image_size=24)[0], *toy, Stage('slow', ('projector',), 1e-3, epochs=1, batch_size=4), objective=slow, report=lines)
    gaps = [b - a for a, b in zip([start, *said], said)]
    out = capsys.readouterr().out
    assert len(said) >= 3 and 'step 0: under way' in out and 'step 1 of 2 (100%): loss' in out, (gaps, out)


SLOW_NOTEBOOK = """
import time, torch
from llava_med.models.llava import tiny_model
from llava_med.train.batches import Collator, batch_loss, encode
from llava_med.train.loop import Stage, fit
from llava_med.train.monitor import watch
model, processor = tiny_model(image_size=24)
tok = processor.tokenizer
rows = [encode(tok, [dict(role='user', content='?'), dict(role='assistant', content=w)], 4) for w in 'abcd']
def slow(model, batch):
    time.sleep(20)
    return batch_loss(model, batch)
slow.unit = 'row'
fit(model, rows, Collator(tok.pad_token_id), Stage('slow', ('language_model',), 1e-3, batch_size=2), objective=slow, report=watch())
"""


@pytest.mark.slow
def test_a_log_of_papermill_has_a_line_every_fifteen_seconds(tmp_path):
    "Two steps of 20 s each, executed as the runner does it."
    import nbformat
    from llava_med.lab.runner import is_progress, run_notebook
    cells = [nbformat.v4.new_code_cell("print('step 0: the notebook begins', flush=True)"), nbformat.v4.new_code_cell(SLOW_NOTEBOOK)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python'))), tmp_path/'slow.ipynb')
    times = []
    outcome = run_notebook(tmp_path/'slow.ipynb', tmp_path/'out.ipynb', {}, 'slow', lambda line: times.append((time.monotonic(), line)) if is_progress(line) else None)
    assert outcome['ok'], outcome
    gaps = [b[0] - a[0] for a, b in zip(times[1:], times[2:])]   # from the first line of the training on
    assert len(gaps) >= 2 and max(gaps) <= 15.5, times


def test_a_function_says_its_unit(): assert as_objective(double).unit == 'row' and as_objective(lambda m, b: 0).unit == 'batch'
