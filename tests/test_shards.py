"What the cells of 03d_shards cannot say: killed writers, killed workers, a scheduler elsewhere, and real articles."
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import dask_processes
from llava_med.data import articles, shards
from llava_med.lab.commands import main
from llava_med.data.conversations import write_records, stream_records
from llava_med.data.images import open_image
from llava_med.world.sets import write_articles
from llava_med.core.runs import read_jsonl, test_data as data_folder
from llava_med.data.shards import (ClusterError, ShardError, check_shards, cluster, figures_on_cluster, in_order, read_index, read_shards,
                              stream_shards, unpack_shards, write_shards)

REPO = Path(__file__).resolve().parents[1]
REAL = data_folder() and data_folder()/'articles'
ENV = {**os.environ, 'PYTHONPATH': str(REPO), 'LLAVA_MED_ROOT': str(REPO), 'OMP_NUM_THREADS': '1'}
COMMAND = 'import sys; from llava_med.lab.commands import main; sys.exit(main())'


def quiet(*_): pass


@pytest.fixture
def images(tmp_path):
    "A folder of twelve different pictures."
    rng = np.random.default_rng(0)
    (tmp_path/'images/a').mkdir(parents=True)
    for i in range(12): Image.fromarray(rng.integers(0, 255, (16, 24, 3), dtype='u1')).save(tmp_path/f'images/a/{i}.png')
    return tmp_path/'images'


def talks(n=12, each=1):
    turns = [{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'Ein Bild. 图\u2028'}]
    return [dict(id=f'{i}-{k}', image=f'a/{i}.png', conversations=turns, tags={'odd': [None, 1.5, {}]} if k else {}) for i in range(n) for k in range(each)]


# Shards

def test_records_and_pictures_survive(images, tmp_path):
    records = [*talks(each=3), dict(id='text only')]
    index = write_shards(records, images, tmp_path/'s', 5)
    assert (index['records'], index['pictures'], len(index['shards'])) == (37, 12, 3) and not check_shards(tmp_path/'s')
    assert list(read_shards(tmp_path/'s')) == records
    assert unpack_shards(tmp_path/'s', tmp_path/'out') == 12
    for i in range(12): assert (tmp_path/f'out/a/{i}.png').read_bytes() == (images/f'a/{i}.png').read_bytes()
    once = write_shards(talks(), images, tmp_path/'once', 5)
    assert index['bytes'] < once['bytes']*2, 'a picture of three records is stored once'


def test_a_file_of_conversations_goes_into_shards_as_a_stream(images, tmp_path):
    write_records(tmp_path/'instruct.json', talks())
    write_shards(stream_records(tmp_path/'instruct.json'), images, tmp_path/'s', 4)
    assert list(read_shards(tmp_path/'s')) == talks()


def test_a_writer_that_fails_goes_on_where_it_was(images, tmp_path):
    def half():
        yield from talks()[:7]
        raise RuntimeError('gone')
    with pytest.raises(RuntimeError): write_shards(half(), images, tmp_path/'s', 3)
    assert sorted(p.name for p in (tmp_path/'s').iterdir()) == ['index.json', 'shard-00000.arrow', 'shard-00001.arrow']
    with pytest.raises(ShardError, match='not complete'): list(read_shards(tmp_path/'s'))
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path/'s').glob('*.arrow'))]
    said = []
    write_shards(talks(), images, tmp_path/'s', 3, say=said.append)
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path/'s').glob('*.arrow'))][:2] == times and len(said) == 3
    assert list(read_shards(tmp_path/'s')) == talks()


SLOW = '''
import json, sys, time
from llava_med.data.shards import write_shards
def slow():
    for r in json.load(open(sys.argv[1])): time.sleep(.05); yield r
write_shards(slow(), sys.argv[2], sys.argv[3], 2)
'''


def test_a_killed_writer_leaves_whole_shards(images, tmp_path):
    (tmp_path/'records.json').write_text(json.dumps(talks()))
    words = [sys.executable, '-c', SLOW, str(tmp_path/'records.json'), str(images), str(tmp_path/'s')]
    write_shards(talks(), images, tmp_path/'calm', 2)
    for k in range(2):
        p = subprocess.Popen(words, env=ENV)
        end = time.monotonic() + 60
        while len(list((tmp_path/'s').glob('shard*.arrow'))) < 2 + k and time.monotonic() < end: time.sleep(.02)
        p.kill(); p.wait()
    kept = {q.name: q.stat().st_mtime_ns for q in (tmp_path/'s').glob('shard*.arrow')}
    listed = [s['file'] for s in json.loads((tmp_path/'s/index.json').read_text())['shards']]
    write_shards(talks(), images, tmp_path/'s', 2)
    assert listed and all((tmp_path/'s'/n).stat().st_mtime_ns == kept[n] for n in listed)
    same = lambda d: [(s['file'], s['sha256']) for s in read_index(d)['shards']]
    assert same(tmp_path/'s') == same(tmp_path/'calm') and not check_shards(tmp_path/'s')


def test_changes_are_noticed(images, tmp_path):
    said = []
    write_shards(talks(), images, tmp_path/'s', 4)
    data = bytearray((images/'a/5.png').read_bytes()); data[-20] ^= 1
    (images/'a/5.png').write_bytes(data)          # of the same size
    write_shards(talks(), images, tmp_path/'s', 4, say=said.append)
    assert [s.split(':')[0] for s in said[:-1]] == ['shard-00001.arrow']
    (tmp_path/'s/shard-00002.arrow').unlink()
    with pytest.raises(ShardError, match='has 0 of'): read_index(tmp_path/'s')
    write_shards(talks(), images, tmp_path/'s', 4)
    (images/'a/6.png').unlink()
    assert write_shards(talks(), images, tmp_path/'s', 4)['missing'] == 1
    Image.new('RGB', (16, 24)).save(images/'a/6.png')
    assert write_shards(talks(), images, tmp_path/'s', 4)['missing'] == 0
    absolute = [dict(r, image=str(images/r['image'])) for r in talks()]
    (images/'a/6.png').unlink()
    assert write_shards(absolute, None, tmp_path/'t', 4)['missing'] == 1
    Image.new('RGB', (16, 24)).save(images/'a/6.png')
    assert write_shards(absolute, None, tmp_path/'t', 4)['missing'] == 0
    with pytest.raises(ShardError, match='holds no index'): list(read_shards(tmp_path/'none'))


def test_streams_split_shuffle_and_hold_every_record_once(images, tmp_path):
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DataLoader
    write_shards(talks(each=2), images, tmp_path/'s', 3)
    ids = [r['id'] for r in talks(each=2)]
    whole = list(stream_shards(tmp_path/'s'))
    assert [o['record'] for o in whole] == talks(each=2)
    for o in whole: assert np.array_equal(np.asarray(o['image']), np.asarray(open_image(images/o['record']['image'])))
    mixed = stream_shards(tmp_path/'s', seed=1, buffer=8)
    orders = []
    for epoch in (0, 1):
        mixed.set_epoch(epoch)
        orders.append([o['record']['id'] for o in DataLoader(mixed, batch_size=None, num_workers=2)])
        assert sorted(orders[-1]) == sorted(ids)
    assert orders[0] != orders[1] and ids not in orders
    halves = [[o['record']['id'] for o in split_dataset_by_node(stream_shards(tmp_path/'s'), k, 2)] for k in range(2)]
    assert all(halves) and sorted(sum(halves, [])) == sorted(ids)


def test_an_unreadable_picture_is_named_not_replaced(images, tmp_path):
    (images/'a/3.png').write_bytes(b'no picture')
    write_shards(talks(), images, tmp_path/'s', 6)
    with pytest.raises(ShardError, match='a/3.png'): list(stream_shards(tmp_path/'s'))


# Clusters

@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "A hundred and sixty articles without pictures, a broken one, and what one process makes of them."
    folder = tmp_path_factory.mktemp('many').resolve()
    write_articles(folder/'few', 6, per_article=(2, 3))
    texts = [p.read_text() for p in sorted((folder/'few').glob('*/*.xml'))]
    for i in range(160):
        d = folder/f'pmc/PMC{i + 1000}.1'; d.mkdir(parents=True)
        (d/f'PMC{i + 1000}.1.xml').write_text(texts[i % 6])
    (folder/'pmc/zz.xml').write_text('no article')
    with contextlib.redirect_stdout(None): assert articles.figures([folder/'pmc'], folder/'alone.jsonl') == 0
    return folder


def equal(many, out): return out.read_bytes() == (many/'alone.jsonl').read_bytes()


def rows(path):
    "Whole lines of a manifest, without its head."
    if not path.exists(): return []
    return [json.loads(x) for x in path.read_text().split('\n')[1:-1]]


def test_one_of_two_workers_is_killed_and_the_result_is_complete(many, tmp_path):
    out, part = tmp_path/'f.jsonl', tmp_path/'.f.jsonl.manifest.part'
    with dask_processes(ENV, 2, tmp_path) as (address, workers):
        p = subprocess.Popen([sys.executable, '-c', COMMAND, 'figures', str(many/'pmc'), '--out', str(out), '--scheduler', address],
                             env=ENV, stdout=subprocess.PIPE, text=True)
        end = time.monotonic() + 90
        while len(rows(part)) < 40 and p.poll() is None and time.monotonic() < end: time.sleep(.01)
        at = len(rows(part))
        workers[0].send_signal(signal.SIGKILL)
        said = p.communicate(timeout=120)[0]
    assert 40 <= at < 160, 'the worker died in the middle'
    assert p.returncode == 0 and equal(many, out), said
    found = read_jsonl(tmp_path/'f.jsonl.manifest.jsonl')[1:]
    assert sorted(r['status'] for r in found) == ['done']*160 + ['unreadable']
    assert max(r['worker_mib'] for r in found) < 400
    assert '160 articles' in said and not list(tmp_path.glob('.f*'))


@pytest.mark.slow
def test_a_killed_run_goes_on(many, tmp_path):
    out, part = tmp_path/'f.jsonl', tmp_path/'.f.jsonl.manifest.part'
    goals, seen = [30, 90], []
    with dask_processes(ENV, 2, tmp_path) as (address, _):
        words = [sys.executable, '-c', COMMAND, 'figures', str(many/'pmc'), '--out', str(out), '--scheduler', address]
        for goal in goals:
            p = subprocess.Popen(words, env=ENV, stdout=subprocess.DEVNULL)
            end = time.monotonic() + 90
            while len(rows(part)) < goal and p.poll() is None and time.monotonic() < end: time.sleep(.005)
            p.kill(); p.wait()
            seen.append(len(rows(part)))
            assert goal <= seen[-1] < 161 and not out.exists()
        with open(part, 'a') as f: f.write('{"source": "half a li')
        with open(tmp_path/'.f.jsonl.part', 'a') as f: f.write('{"id": "half a rec')
        said = []
        assert figures_on_cluster([many/'pmc'], out, address, say=said.append) == 0
    assert said[0] == f'{seen[-1]} of 161 articles are there already.' and equal(many, out)


def test_articles_that_changed_are_read_again(many, tmp_path):
    plan = [(str(p), '') for p in articles.find_articles([many/'pmc'])]
    head, part, manifest = b'{"images_dir": null}\n', tmp_path/'p', tmp_path/'m'
    row = lambda path, end: json.dumps(dict(source=path, mark=shards._mark(path), end=end)) + '\n'
    part.write_bytes(b'x'*25)
    manifest.write_bytes(head + ''.join(row(p, 10*(i + 1)) for i, (p, _) in enumerate(plan[:3])).encode())
    assert shards._kept(part, manifest, plan, head)[::2] == (20, 2), 'the third row says more than was written'
    assert shards._kept(part, manifest, plan[1:], head)[::2] == (0, 0)
    assert shards._kept(part, manifest, plan, b'{"images_dir": "x"}\n') == (0, 0, 0)
    manifest.write_bytes(head + (row(plan[0][0], 10) + row(plan[1][0], 20).replace('mark": "', 'mark": "9')).encode())
    assert shards._kept(part, manifest, plan, head)[::2] == (10, 1)


def test_an_article_that_kills_its_workers_costs_a_row():
    with cluster(workers=1) as client:
        found = dict(in_order(client, os._exit, [3], say=quiet))
    assert isinstance(found[3], ClusterError) and 'died of it' in str(found[3])


def test_results_keep_their_order_and_few_tasks_are_under_way():
    taken = []
    def jobs():
        for i in range(40): taken.append(i); yield i
    with cluster(workers=2) as client:
        ahead = []
        for job, got in in_order(client, abs, jobs(), ahead=5): ahead.append(len(taken) - job); assert got == job
    assert len(ahead) == 40 and max(ahead) <= 6


@pytest.mark.skipif(REAL is None or not REAL.is_dir(), reason='LLAVA_MED_TESTDATA holds no folder articles')
def test_real_articles_by_the_command(tmp_path, capsys):
    folders = [str((REAL/d).resolve()) for d in ('xml', 'packages')]
    assert main(['figures', *folders, '--out', str(tmp_path/'one.jsonl')]) == 0
    assert main(['figures', *folders, '--out', str(tmp_path/'two.jsonl'), '--workers', '2']) == 0
    assert (tmp_path/'one.jsonl').read_bytes() == (tmp_path/'two.jsonl').read_bytes()
    one, two = (read_jsonl(tmp_path/f'{n}.jsonl.problems.jsonl') for n in ('one', 'two'))
    assert one == two and one
    records = [r for r in read_jsonl(tmp_path/'two.jsonl') if r['image']]
    index = write_shards(records, None, tmp_path/'shards', 10)
    assert index['records'] == len(records) > 20 and list(read_shards(tmp_path/'shards')) == records


def test_nothing_usable_is_exit_code_1(tmp_path, capsys):
    (tmp_path/'a.xml').write_text('no article')
    (tmp_path/'out.jsonl').write_text('old')
    assert main(['figures', str(tmp_path/'a.xml'), str(tmp_path/'none'), '--out', str(tmp_path/'out.jsonl'), '--workers', '1']) == 1
    assert (tmp_path/'out.jsonl').read_text() == 'old' and 'no record was written' in capsys.readouterr().out
    found = read_jsonl(tmp_path/'out.jsonl.manifest.jsonl')[1:]
    assert [r['status'] for r in found] == ['unreadable']*2 and all(r['problems'] for r in found)


@pytest.mark.parametrize('words, said', [(['--workers', '0'], 'at least 1'), (['--workers', '2', '--scheduler', 'tcp://127.0.0.1:9'], 'leave it away')])
def test_odd_options_end_in_a_sentence(words, said, tmp_path, capsys):
    assert main(['figures', str(tmp_path), '--out', str(tmp_path/'o'), *words]) == 1
    assert said in capsys.readouterr().err
