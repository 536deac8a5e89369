"The command line: one level of parsers, help that fits a screen, and examples that run."
import argparse
import contextlib
import io
import json
import shlex
import subprocess
import sys

import pytest
from PIL import Image
from test_convert import Original

from llava_med.core.runs import write_csv, write_jsonl
from llava_med.lab import commands, publishing, rehearsal, sweeps
from llava_med.lab.commands import COMMANDS, main, make_parser
from llava_med.lab.presets import plan_run, read_preset
from llava_med.world.sets import write_articles

NAMES = [add.__name__.removeprefix('add_') for add in COMMANDS]


def help_of(*words, parser=None):
    "What is printed with --help."
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as e:
        (parser or make_parser()).parse_args([*words, '--help'])
    assert e.value.code == 0
    return out.getvalue()


def faults_of(text):
    "What a help text does wrong."
    lines = text.splitlines()
    found = [f'{len(lines)} lines'] if len(lines) > 24 else []
    found += [f'{len(x)} columns: {x}' for x in lines if len(x) > 100]
    return found + ([] if examples_of(text) else ['no example'])


def examples_of(text):
    "The words of each example, without its remark."
    shown = text.partition('examples:\n')[2].splitlines()
    return [shlex.split(x, comments=True)[1:] for x in shown if x.startswith('  llava-med ')]


def parsers():
    "Command → its parser."
    made = make_parser()
    [commands] = [a for a in made._actions if isinstance(a, argparse._SubParsersAction)]
    return commands.choices


# Help

@pytest.mark.parametrize('columns', ['60', '80', '200'])
def test_every_help_fits_a_screen_however_wide_the_terminal(columns, monkeypatch):
    monkeypatch.setenv('COLUMNS', columns)
    assert list(parsers()) == NAMES
    found = {n: faults_of(help_of(*words)) for n, words in {'': [], **{n: [n] for n in NAMES}}.items()}
    assert not {n: f for n, f in found.items() if f}


def test_every_option_is_told():
    for name, p in parsers().items():
        text = help_of(name)
        for a in p._actions:
            for word in a.option_strings or [a.metavar]: assert word == '-h' or word == '--help' or word in text, (name, word)


def test_no_parser_is_below_a_command():
    for name, p in parsers().items():
        assert not [a for a in p._actions if isinstance(a, argparse._SubParsersAction)], name
    source = [f.read_text() for f in commands.Path(commands.__file__).parents[1].rglob('*.py')]
    assert sum('argparse.ArgumentParser(' in s for s in source) == 1, 'one module makes parsers'


def test_help_needs_no_torch():
    code = ("import sys\nfrom llava_med.lab.commands import main\n"
            "try: main(['convert', '--help'])\nexcept SystemExit: pass\n"
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_names_that_the_parser_repeats_are_those_of_the_library():
    from llava_med.evaluate.judge import ORDERS
    from llava_med.evaluate.scorers import SCORERS
    from llava_med.models.exchange import TEMPLATES
    assert commands.TEMPLATE_NAMES == tuple(TEMPLATES)
    assert commands.JUDGE_ORDERS == ('both', 'alternate', *ORDERS)
    assert commands.SCORER_NAMES == tuple(SCORERS)


def test_the_rules_of_help_can_fail():
    parser = argparse.ArgumentParser('llava-med')
    p = commands.add_command(parser.add_subparsers(), 'x', '', print, '', 'Long. '*30, '')
    for i in range(25): p.add_argument(f'--o{i}')
    found = ' '.join(faults_of(help_of('x', parser=parser)))
    for word in ('lines', 'columns', 'no example'): assert word in found


# Examples

QUESTION = dict(image='0.jpg', type='conversation', fig_caption='A cyst.', in_text_mention=None,
                gpt4_answer='There is a cyst.', domain={'mri': True})


def vqa_set(folder, n=6):
    "Made-up questions in VQA-RAD's layout, and their image."
    (folder/'images').mkdir(parents=True)
    Image.new('L', (8, 8)).save(folder/'images/0.png')
    rows = [dict(qid=i, image_name='0.png', question=f'Is it {i}?', answer=('yes', 'no')[i % 2],
                 answer_type='CLOSED', question_type='PRES', phrase_type='freeform',
                 image_organ='CHEST') for i in range(n)]
    (folder/'testset.json').write_text(json.dumps(rows))


def answer_file(name):
    "What a model said, for the command of that name."
    asked = 'What is {}?' if name == 'judge' else 'Is it {}?'
    return [dict(question_id=i, prompt=asked.format(i), text='yes') for i in range(6)]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with the files that the examples name."
    folder = tmp_path_factory.mktemp('place')
    write_articles(folder/'data/pmc', 2, per_article=(1, 1))
    (folder/'data/pmc/truth.jsonl').unlink()
    vqa_set(folder/'vqa_rad')
    Original(folder/'llava-med-v1.5')
    write_jsonl(folder/'questions.jsonl', [dict(QUESTION, question_id=i, text=f'What is {i}?') for i in range(6)])
    return folder


def dry_run(preset, name=None, only=(), sets=(), say=None, verbose=False):
    "The run as far as it can be planned: presets, steps and parameters must exist."
    assert plan_run(read_preset(preset), name or 'x', list(only), list(sets))
    return {}


@pytest.fixture
def dry(monkeypatch, place):
    "Where an example would take long, or needs a network or the repository, it goes as far as its plan."
    done = []
    note = lambda name: lambda *a, **k: done.append(name) or 0
    monkeypatch.chdir(place)
    monkeypatch.setattr(commands, 'check_memory', lambda args: None)
    monkeypatch.setattr(commands, 'run_pipeline', dry_run)
    monkeypatch.setattr(rehearsal, 'rehearse', dry_run)
    monkeypatch.setattr(rehearsal, 'join_base', lambda preset: done.append('join') or 'joined')
    real = sweeps.run_batch
    monkeypatch.setattr(sweeps, 'run_batch', lambda grid, address, n, say, plan, preset:
                        real(grid, address, n, say, True, preset))
    for name in ('get_entry', 'get_pmc'): monkeypatch.setattr(f'llava_med.data.catalogue.{name}', note(name))
    monkeypatch.setattr(publishing, 'refresh', lambda run: done.append('refresh') or [])
    monkeypatch.setattr(publishing, 'save_tuned', lambda run: None)
    (place/'released').mkdir(exist_ok=True)
    monkeypatch.setattr(publishing, 'release', lambda *a: done.append('release') or place/'released')
    monkeypatch.setattr(publishing, 'fill_pages', lambda: done.append('fill_pages') or [None])
    monkeypatch.setattr(publishing, 'readme', lambda: place/'README.md')
    monkeypatch.setattr(publishing, 'write_data_page', lambda: place/'data/README.md')
    return done


def needs_the_hub(words):
    "An example whose model or vision tower would have to be downloaded."
    return words[0] == 'convert' and words[1:2] + words[-1:] != ['llava-med-v1.5', 'own']


@pytest.mark.parametrize('name', NAMES)
def test_the_examples_run(name, dry, place, capsys):
    write_jsonl(place/'answers.jsonl', answer_file(name))
    for words in examples_of(help_of(name)):
        if name in ('score', 'lmms'): words += ['--part']   # the file here is a small part of the set
        if needs_the_hub(words): make_parser().parse_args(words)
        else: assert main(words) == 0, (words, capsys.readouterr().err)
    wanted = dict(get=['get_entry', 'get_pmc'], plan=['join'], refresh=['refresh'], release=['release'], readme=['fill_pages'])
    assert set(wanted.get(name, [])) <= set(dry), 'the example went as far as what is replaced here'
    files = dict(figures='figures.jsonl', score='scores.csv', lmms='lmms/vqa_rad.parquet',
                 convert='llava-med-hf/config.json', judge='answers.judgements.jsonl')
    if name in files: assert (place/files[name]).exists()


@pytest.mark.parametrize('words', [['run', 'tiny', '--only', '9_none'], ['run', 'tiny', '--set', 'all.sed=1'],
                                   ['batch', 'no_grid'], ['get', 'slak']])
def test_an_example_that_is_wrong_would_be_noticed(words, dry): assert main(words) == 2


@pytest.mark.parametrize('words', [[], ['rnu'], ['run'], ['run', 'tiny', '--oly', '1'], ['judge', 'q', 'a'],
                                   ['judge', 'q', '--offline'], ['judge', 'q', 'a', '--offline', '--local', 'x'],
                                   ['convert', 'a', 'b', '--template', 'none'], ['score', 'a'], ['lmms', 'a']])
def test_what_cannot_be_read_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as e: main(words)
    assert e.value.code == 2 and 'usage: llava-med' in capsys.readouterr().err


# What is said before and after a run

@pytest.fixture
def told(monkeypatch, dry):
    "`run` with made-up costs; what was asked, and whether somebody sits there."
    asked, there = [], dict(yes=True, answer='n')
    monkeypatch.setattr(commands, '_told_costs', lambda args: ['It will take 40 hours.'])
    monkeypatch.setattr('builtins.input', lambda s: asked.append(s) or there['answer'])
    monkeypatch.setattr(commands, '_at_terminal', lambda: there['yes'])
    monkeypatch.setattr(commands, 'agreed', lambda lines, yes=False: AGREED(lines, yes, input))
    return asked, there


AGREED = commands.agreed


@pytest.mark.parametrize('words, sits, answer, code, n', [([], True, 'n', 130, 1), ([], True, '', 130, 1), ([], True, 'y', 0, 1),
                                                          (['--yes'], True, 'n', 0, 0), ([], False, 'n', 0, 0)])
def test_a_costly_run_is_asked_about_on_a_terminal_only(words, sits, answer, code, n, told, capsys):
    asked, there = told
    there.update(yes=sits, answer=answer)
    assert main(['run', 'tiny', '--name', 'x', '--set', 'all.epochs=100', *words]) == code
    assert len(asked) == n and 'It will take 40 hours.' in capsys.readouterr().out


def test_hours_and_downloads_follow_from_what_was_typed():
    one = commands.costs_of('tiny', 'x', [], ['3_stage2_tuning.epochs=4'])
    assert one == [], 'minutes need no word'
    many = commands.costs_of('tiny', 'x', [], ['all.epochs=100', '1_data_prep.clip=openai/clip-vit-large-patch14'])
    assert 'about 6 hours' in many[0] and '1.7 GB' in many[1] and len(many) == 2


def test_only_what_can_be_costly_is_reckoned(monkeypatch):
    monkeypatch.setattr(commands.subprocess, 'run', lambda *a, **k: pytest.fail('reckoned'))
    for words in (['run', 'tiny'], ['run', 'tiny', '--set', 'all.seed=1'], ['run', 'tiny', '--rehearse', '--set', 'all.epochs=9']):
        assert commands._told_costs(make_parser().parse_args(words)) == []
    with pytest.raises(pytest.fail.Exception): commands._told_costs(make_parser().parse_args(['run', 'tiny', '--set', 'all.epochs=9']))


def test_who_brings_articles_hears_what_is_mixed_in_and_what_was_scored(tmp_path):
    plan = plan_run(read_preset('tiny'), 'x', sets=['1_data_prep.articles=["mine/"]'])
    assert 'about 6000 drawn figures' in commands.mixed_line(plan) and '1_data_prep.n_figures=0' in commands.mixed_line(plan)
    (tmp_path/'1_data_prep').mkdir()
    write_jsonl(tmp_path/'1_data_prep/figures.jsonl', [dict(source=s) for s in ('phantoms/PMC1', 'phantoms/PMC2', 'mine/PMC3')])
    assert commands.own_line(tmp_path, plan).startswith('Of the 3 figures to train on 1 are yours.')
    asked = plan_run(read_preset('tiny'), 'x', sets=['1_data_prep.articles=["mine/"]', '4_evaluation.vqa=my_questions/'])
    assert commands.own_line(tmp_path, asked) == commands.own_line(tmp_path, plan_run(read_preset('tiny'), 'x')) == ''


def test_the_tables_of_a_run_say_whose_questions_they_are_about(tmp_path):
    (tmp_path/'4_evaluation').mkdir()
    row = dict(dataset='my_questions', split='test', condition='image', slice='all', metric='strict', value=.5, low=.4, high=.6, n_images=9, n_clusters=9)
    write_csv(tmp_path/'4_evaluation/scores.csv', [row | dict(model=m, n_items=12) for m in ('base', 'stage2', 'stage2-base')])
    text = commands.scores_text(tmp_path, ['4_evaluation'])
    assert text.strip().endswith('asked: base 12 questions about 9 images; stage2 12 questions about 9 images (my_questions, test)')


def test_scores_fit_a_screen_and_the_rest_is_in_the_file(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    write_jsonl(place/'answers.jsonl', answer_file('score'))
    assert main(['score', 'vqa_rad/testset.json', 'answers.jsonl', '--part', '--out', 'all.csv']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25 and max(map(len, lines[2:])) <= 100
    shown = [x.split()[0] for x in lines if x.startswith('  ')]
    written = (place/'all.csv').read_text().splitlines()
    assert shown == ['strict', 'strict.closed', 'llavamed_v1.closed_gated'] and len(written) - 1 > 50
    assert f'{len(written) - 1} rows in all -> all.csv' == lines[-1]
