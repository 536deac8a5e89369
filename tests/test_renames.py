"Old names of parameters, fields and columns work for one version, and a record that holds them is read."
import json

import pytest

from llava_med.core.renames import ARGUMENTS_RENAMED, RENAMED, STAGE_RENAMED, old_names, recorded_values
from llava_med.lab import estimate, finished, tasks
from llava_med.lab.presets import plan_run, read_preset, read_yaml
from llava_med.lab.steps import pipeline, read_parameters
from llava_med.train import launch, loop, memory, stages

TABLES = (RENAMED, STAGE_RENAMED, ARGUMENTS_RENAMED)


def test_every_new_name_is_one_of_its_place():
    offered = {n for p in pipeline().values() for n in read_parameters(p)}
    assert set(RENAMED.values()) <= offered and not set(RENAMED) & offered
    fields = set(loop.Stage.__dataclass_fields__)
    assert set(STAGE_RENAMED.values()) <= fields and not set(STAGE_RENAMED) & fields
    assert not any(set(t) & set(t.values()) for t in TABLES), 'a name that is old and new leads in a circle'


def test_old_fields_of_a_stage_and_its_settings():
    stage = loop.Stage('a', lr=1e-3, parts=('projector',), clip=3., rates={'projector': 1e-4})
    assert stage == loop.Stage('a', ('projector',), 1e-3, max_grad_norm=3., learning_rates={'projector': 1e-4})
    assert loop.stage_record('stage2', parts=['language_model']) == loop.stage_record('stage2', trainable=['language_model'])
    old = stages.Settings(n_held=3, batch_tokens=5, checkpointing='on', processes=2)
    assert old == stages.Settings(n_val=3, max_tokens_per_microbatch=5, gradient_checkpointing='on', nproc=2)
    assert memory.MemoryPlan(9, checkpointing=True, state=1, per_token=1, free=1).gradient_checkpointing


@pytest.mark.parametrize('call', [
    lambda: loop.Stage('a', ('projector',), 1e-3, clip=3., max_grad_norm=3.), lambda: stages.Settings(n_held=3, n_val=3),
    lambda: loop.fit(None, [], None, None, workers=2, grad_workers=2), lambda: launch.train(None, [], None, None, '', processes=1, nproc=1),
    lambda: stages.prepare(None, [], None, share=True, pack_by_image=True), lambda: memory.plan_memory(None, [], None, checkpointing='on', gradient_checkpointing='on')])
def test_both_names_are_refused_in_python(call):
    with pytest.raises(ValueError, match='is now called .*, and both are given: leave .* away'): call()


def test_arguments_are_handed_on_under_present_names():
    @old_names(ARGUMENTS_RENAMED)
    def outer(folder, nproc=1, **more): return nproc, more
    assert outer('', processes=2, held=1, loaders=3, whole=True, bf16=True) == (2, dict(validation=1, num_workers=3, drop_last=True, bf16=True))


@pytest.mark.parametrize('sets, step, name, value', [
    ('3b_vqa_tuning.n_held=7', '3b_vqa_tuning', 'n_val', 7), ('all.checkpointing=on', '2_stage1_alignment', 'gradient_checkpointing', 'on'),
    ('3.share=false', '3_stage2_tuning', 'pack_by_image', False), ('2.processes=2', '2_stage1_alignment', 'nproc', 2),
    ('2.batch_tokens=99', '2_stage1_alignment', 'max_tokens_per_microbatch', 99)])
def test_old_names_on_the_command_line(sets, step, name, value):
    preset = read_preset('tiny')
    plan = plan_run(preset, 'x', only=['1', '2', '3', '3b', '4'] if step == '3b_vqa_tuning' else [], sets=[sets])
    assert plan[step][name] == value


def test_a_row_under_old_names_still_fits(tmp_path):
    old = {'3b_vqa_tuning': {'n_held': 400, 'share': True, 'processes': 1, 'stage': {'rates': {'projector': 2e-3}}}}
    new = {'3b_vqa_tuning': {'n_val': 400, 'pack_by_image': True, 'nproc': 1, 'stage': {'learning_rates': {'projector': 2e-3}}}}
    assert finished.changed_setting(old, new, {}) == '' and finished.changed_setting(new, new, {}) == ''
    changed = {'3b_vqa_tuning': new['3b_vqa_tuning'] | {'pack_by_image': False}}
    assert finished.changed_setting(old, changed, {}) == '3b_vqa_tuning.pack_by_image was True and is False'
    rows = tmp_path/'rows.csv'
    finished.keep_finished(rows, 'aligned', 0, old, [('3b_vqa_tuning/held_loss/1', .5)])
    assert finished.read_finished(rows)['aligned', 0]['3b_vqa_tuning/val_loss/1'] == '0.5'
    (tmp_path/'run').mkdir()
    (tmp_path/'run/val_losses.csv').write_text('step,epoch,samples,val_loss\n719,0,5759,0.12715\n')
    assert list(finished._curve(tmp_path/'run', 'run')) == [('run/val_loss/0', '0.12715')]


def test_records_of_earlier_runs_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path))
    told = {'n_held': 400, 'checkpointing': 'auto', 'share': True, 'epochs': 1}
    record = {'run': 'old', 'preset': 'tiny', 'steps': {'3b_vqa_tuning': {'state': 'done', 'wall_s': 60., 'parameters': told}}}
    (tmp_path/'old').mkdir()
    (tmp_path/'old/run.json').write_text(json.dumps(record))
    used, took = tasks.past_steps()['3b_vqa_tuning'][0]
    assert took == 60 and used['n_val'] == 400 and not set(RENAMED) & set(used)
    same = recorded_values(told)
    assert not estimate._changed('old', '3b_vqa_tuning', same) and estimate._changed('old', '3b_vqa_tuning', same | {'n_val': 0})


def test_shipped_files_hold_no_old_name(repo):
    said = [p for p in repo.glob('nbs/pipeline/**/*.yaml') if 'gpu_paths' not in p.name]
    def keys(x): return {k for k in x} | set().union(*map(keys, x.values())) if isinstance(x, dict) else set().union(*map(keys, x)) if isinstance(x, list) else set()
    for p in said: assert not {k.split('.')[-1] for k in map(str, keys(read_yaml(p.read_text())))} & {*RENAMED, 'rates', 'clip'}, p
    record = json.loads((repo/'outputs/example/run.json').read_text())
    assert not any(set(s.get('parameters', {})) & set(RENAMED) for s in record['steps'].values())


def test_threads_read_code_at_once():
    "As the tasks of a batch do; without a lock CPython 3.11 may end in a SystemError."
    from concurrent.futures import ThreadPoolExecutor
    from llava_med.core.renames import syntax_tree
    source = '\n'.join(f'def f{i}(a: int, *b) -> list: return [x*{i} for x in (a, *b)]' for i in range(200))
    with ThreadPoolExecutor(8) as pool: trees = list(pool.map(syntax_tree, [source]*40))
    assert all(len(t.body) == 200 for t in trees)
