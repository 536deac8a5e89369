"The downloader against a bucket on this machine that drops, refuses, truncates and lies; and killed at random points."
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from llava_med.data import pubmed
from llava_med.data.articles import read_articles
from llava_med.core.testing import LocalBucket
from llava_med.data.pubmed import get_articles, get_pmc, pairs, read_manifest, search_pmc
from llava_med.data.web import NoAnswer, Web, WebError
from llava_med.world.sets import write_articles
from llava_med.core.runs import OutputError, read_jsonl

N = 8


@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    "Articles in PubMed Central's layout."
    folder = tmp_path_factory.mktemp('phantoms')
    write_articles(folder, N, per_article=(2, 3))
    (folder/'truth.jsonl').unlink()
    return folder


@pytest.fixture
def bucket(phantoms):
    with LocalBucket(phantoms) as b: yield b


@pytest.fixture
def web(): return Web(per_second=2000, tries=4, backoff=.02, timeout=(2, .5))


quiet = dict(say=lambda s: None)


def fetch(jobs, out, *args, **how):
    "The rows of a run."
    get_articles(jobs, out, *args, **how)
    return read_manifest(out)


ids = lambda phantoms: [p.name[:-2] for p in sorted(phantoms.iterdir())]
md5 = lambda data: hashlib.md5(data).hexdigest()


def tree(folder):
    "Name → md5 of all files that a run leaves, but for the note of when it began and its lock."
    return {p.relative_to(folder).as_posix(): md5(p.read_bytes()) for p in folder.rglob('*')
            if p.is_file() and p.name not in ('selection.json', '.lock')}


@pytest.fixture
def calm(phantoms, bucket, web, tmp_path):
    "What an undisturbed run leaves."
    get_articles(dict.fromkeys(ids(phantoms)), tmp_path/'calm', web, base=bucket.url)
    bucket.asked.clear(); bucket.served.clear()
    return tree(tmp_path/'calm')


def test_the_folder_is_read_as_articles(phantoms, bucket, web, tmp_path):
    rows = fetch(dict.fromkeys(ids(phantoms)), tmp_path/'out', web, base=bucket.url)
    ours, theirs = (list(read_articles([d])) for d in (tmp_path/'out', phantoms))
    same = lambda rs: [{k: v for k, v in r.items() if k not in ('source', 'image')} for r in rs]
    assert same(ours) == same(theirs) and {r['status'] for r in rows.values()} == {'done'}
    assert sum(r['image'] is not None for r in ours) == sum(r['figures'] for r in rows.values())


@pytest.mark.parametrize('fault', ['drop', 'short', 'wrong', 429, 500, 503])
def test_a_passing_fault_leaves_no_trace(fault, phantoms, bucket, web, tmp_path, calm):
    for key in list(bucket.objects): bucket.faults[key] = [fault]
    bucket.faults[''] = [fault]
    get_articles(dict.fromkeys(ids(phantoms)), tmp_path/'out', web, base=bucket.url)
    assert tree(tmp_path/'out') == calm
    assert not any(v for k, v in bucket.faults.items() if k in calm), 'every fault was met'


def test_a_fault_that_stays_is_a_row_and_the_next_run_mends_it(phantoms, bucket, web, tmp_path, calm):
    a, b, c, d = ids(phantoms)[:4]
    image = next(k for k in bucket.objects if k.startswith(f'{b}.1/') and k.endswith('.jpg'))
    bucket.faults = {f'{a}.1/{a}.1.xml': ['wrong']*4, image: ['short', 'drop', 503, 'drop'],
                     f'metadata/{c}.1.json': [429]*4, f'metadata/{d}.1.json': ['wrong']*4}
    rows = fetch(dict.fromkeys(ids(phantoms)), tmp_path/'out', web, base=bucket.url)
    assert [rows[i]['status'] for i in (a, b, c, d)] == ['failed']*4
    assert Counter(r['status'] for r in rows.values()) == {'failed': 4, 'done': N - 4}
    for i, word in ((a, 'md5'), (b, 'tries'), (c, '429'), (d, 'unreadable')): assert word in rows[i]['reason']
    assert not any((tmp_path/'out'/f'{i}.1').exists() for i in (a, b, c, d))
    assert sorted(p.name for p in (tmp_path/'out').glob('.PMC*')) == [f'.{a}.1.part', f'.{b}.1.part']
    bucket.asked.clear()
    get_articles(dict.fromkeys(ids(phantoms)), tmp_path/'out', web, base=bucket.url, **quiet)
    assert tree(tmp_path/'out') == calm
    settled = [r['version'] for r in rows.values() if r['status'] == 'done']
    assert not any(k.startswith(tuple(settled)) for k in bucket.asked), 'what is done is not asked for again'
    assert bucket.asked[f'{b}.1/{b}.1.xml'] == 0, 'nor is what is whole of an article in flight'


def test_missing_withdrawn_left_out(phantoms, bucket, web, tmp_path):
    a, b, c, d, e, f, g, h = ids(phantoms)
    bucket.change(f'{a}.1', is_retracted=True)
    bucket.change(f'{b}.1', is_historical_ocr=True)
    bucket.change(f'{c}.1', license_code='CC BY-NC-ND')
    bucket.change(f'{d}.1', is_pmc_openaccess=False)
    del bucket.objects[f'metadata/{e}.1.json']
    del bucket.objects[f'{f}.1/{f}.1.xml']
    image = next(k for k in bucket.objects if k.startswith(f'{g}.1/') and k.endswith('.jpg'))
    del bucket.objects[image]
    bucket.change(f'{h}.1', media_urls=[])
    rows = fetch(dict.fromkeys([*ids(phantoms), 'PMC12']), tmp_path/'out', web, base=bucket.url, licences=('CC BY', 'CC0'))
    assert [rows[i]['status'] for i in (a, b, c, d, e, f, g, h, 'PMC12')] == \
        ['withdrawn', 'left_out', 'left_out', 'left_out', 'missing', 'missing', 'done', 'done', 'missing']
    assert 'CC BY-NC-ND' in rows[c]['reason'] and rows[g]['absent'] == [image.split('/')[1]] and rows[h]['figures'] == 0
    assert [r['pmcid'] for r in read_jsonl(tmp_path/'out/manifest.jsonl')] == ['PMC12', *ids(phantoms)]


def test_the_newest_version_that_may_be_taken(phantoms, bucket, web, tmp_path):
    a = ids(phantoms)[0]
    for v in (2, 10):
        for k in [k for k in bucket.objects if k.startswith(f'{a}.1/')]: bucket.objects[k.replace(f'{a}.1', f'{a}.{v}')] = bucket.objects[k]
        moved = json.loads(json.dumps(bucket.page(f'{a}.1')).replace(f'{a}.1', f'{a}.{v}'))
        bucket.change(f'{a}.{v}', **moved | {'is_manuscript': v == 10})
    one = lambda i, out, **how: fetch({i: None}, tmp_path/out, web, base=bucket.url, **how)[a]
    assert one(a, 'newest')['version'] == f'{a}.2'
    assert one(a, 'manuscript', manuscripts=True)['version'] == f'{a}.10'
    assert one(f'{a}.1', 'named')['version'] == f'{a}.1'
    assert one(a, 'named', refresh=True)['version'] == f'{a}.2' and not (tmp_path/f'named/{a}.1').exists()
    bucket.change(f'{a}.2', is_retracted=True)
    assert one(a, 'named', refresh=True)['status'] == 'withdrawn' and not (tmp_path/f'named/{a}.2').exists()


def test_supplements_and_what_no_figure_uses_stay_in_the_bucket(phantoms, bucket, web, tmp_path):
    a = ids(phantoms)[0]
    more = {'film.mp4': b'x', 'table.xlsx': b'y', 'e001.gif': b'z', f'{a}.1.pdf': b'p'}
    urls = [f's3://pmc-oa-opendata/{a}.1/{k}?md5={md5(v)}' for k, v in more.items()]
    bucket.objects |= {f'{a}.1/{k}': v for k, v in more.items()}
    bucket.change(f'{a}.1', media_urls=bucket.page(f'{a}.1')['media_urls'] + urls)
    get_articles({a: None}, tmp_path/'out', web, base=bucket.url)
    assert not any(bucket.asked[f'{a}.1/{k}'] for k in more)


def test_real_articles_get_the_figures_that_the_reader_finds(web, tmp_path):
    from llava_med.core.runs import test_data as data_folder
    packages = sorted((data_folder()/'articles/packages').iterdir()) if data_folder() else []
    if not packages: pytest.skip('needs LLAVA_MED_TESTDATA')
    for i, folder in enumerate(packages, 1):
        new = tmp_path/f'bucket/PMC{i}.1'
        new.mkdir(parents=True)
        for p in folder.iterdir(): (new/(f'PMC{i}.1.xml' if p.suffix == '.xml' else p.name)).write_bytes(p.read_bytes())
    with LocalBucket(tmp_path/'bucket') as b: rows = fetch(dict.fromkeys(f'PMC{i+1}' for i in range(len(packages))), tmp_path/'out', web, base=b.url)
    assert {r['status'] for r in rows.values()} == {'done'}
    found = [[(r['fig_id'], r['image'] and os.path.basename(r['image'])) for r in read_articles([tmp_path/d])] for d in ('bucket', 'out')]
    assert found[0] == found[1] and sum(image is not None for _, image in found[0]) >= 20
    taken = {p.name for p in (tmp_path/'out').rglob('*') if p.is_file()}
    assert not taken & {'e001.png', 't003.png'}, 'equations and tables stay in the bucket'


def test_a_name_cannot_leave_its_folder(phantoms, bucket, web, tmp_path):
    a = ids(phantoms)[0]
    name = bucket.page(f'{a}.1')['media_urls'][0].split('/')[-1].split('?')[0]
    bucket.change(f'{a}.1', media_urls=[f's3://b/{a}.1/../../{name}', f's3://b/{a}.1/x/{name}', f's3://b/{a}.1/..\\{name}', f's3://b/other/{name}'])
    get_articles({a: None}, tmp_path/'in/out', web, base=bucket.url)
    assert {p.relative_to(tmp_path/'in').parts[0] for p in (tmp_path/'in').rglob('*')} == {'out'}
    assert sorted(p.name for p in (tmp_path/f'in/out/{a}.1').iterdir()) == [f'{a}.1.json', f'{a}.1.xml']


def test_a_broken_transfer_goes_on_where_it_was(phantoms, bucket, web, tmp_path):
    key = max(bucket.objects, key=lambda k: len(bucket.objects[k]))
    bucket.faults[key] = ['short', 'short']
    seen = []
    chunks = Web.chunks
    def spy(self, url, params=None, headers=None): seen.append((headers or {}).get('Range')); return chunks(self, url, params, headers)
    web.chunks = spy.__get__(web)
    web.save(f'{bucket.url}/{key}', tmp_path/'x', md5=md5(bucket.objects[key]))
    half = len(bucket.objects[key])//2
    assert seen[0] is None and seen[1] == f'bytes={half}-' and len(seen) == 3
    # a file that was replaced meanwhile is not glued to the half of its predecessor
    part, tag = tmp_path/'.y.part', tmp_path/'.y.tag'
    part.write_bytes(b'old bytes'); tag.write_text('"other"')
    web.tries = 1
    with pytest.raises(NoAnswer): web.save(f'{bucket.url}/{key}', tmp_path/'y', md5=md5(bucket.objects[key]))
    assert not part.exists() and not tag.exists()


class Chunks(BaseHTTPRequestHandler):
    "An answer without a length, as of archives that are packed on the way; twice it breaks off."
    protocol_version, log_message, asked, data = 'HTTP/1.1', lambda *a: None, 0, bytes(range(256))*400

    def do_GET(self):
        Chunks.asked += 1
        self.send_response(200)
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        for i in range(0, len(self.data), 10_000):
            c = self.data[i:i+10_000]
            self.wfile.write(f'{len(c):x}\r\n'.encode() + c + b'\r\n')
            if Chunks.asked < 3 and i > 50_000: self.close_connection = True; return
        self.wfile.write(b'0\r\n\r\n')


def test_an_answer_without_a_length_is_whole_or_not_there(web, tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Chunks)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    try: assert web.save(f'http://127.0.0.1:{server.server_port}/x', tmp_path/'x') == len(Chunks.data)
    finally: server.shutdown(); server.server_close()
    assert Chunks.asked == 3 and (tmp_path/'x').read_bytes() == Chunks.data


def test_time_outs_and_endless_answers(phantoms, bucket, tmp_path):
    key = max(bucket.objects, key=lambda k: len(bucket.objects[k]))
    with pytest.raises(WebError, match='larger than'): Web(1000).save(f'{bucket.url}/{key}', tmp_path/'x', limit=1000)
    bucket.faults[key] = ['slow']*2
    start = time.monotonic()
    with pytest.raises(NoAnswer, match='took longer'): Web(1000, 2, .01, deadline=.3).get(f'{bucket.url}/{key}')
    bucket.delay = 1
    with pytest.raises(NoAnswer, match='broke off'): Web(1000, 2, .01, timeout=(1, .1)).get(f'{bucket.url}/{key}')
    assert time.monotonic() - start < 10


def test_the_rate_is_kept_over_all_threads_and_a_wish_to_wait_is_respected(phantoms, bucket, tmp_path):
    start = time.monotonic()
    get_articles(dict.fromkeys(ids(phantoms)[:3]), tmp_path/'out', Web(per_second=20), base=bucket.url, workers=8)
    took = time.monotonic() - start
    assert took >= (sum(bucket.asked.values()) - 1)/20
    w = Web(1000)
    w.hold(.4)
    start = time.monotonic()
    w.get(f'{bucket.url}/metadata/{ids(phantoms)[0]}.1.json')
    assert time.monotonic() - start >= .4


def test_a_dead_network_stops_the_run(phantoms, web, tmp_path, monkeypatch):
    monkeypatch.setattr(pubmed, 'GIVE_UP', 3)
    web.tries = 1
    with pytest.raises(NoAnswer, match='goes on'): get_articles(dict.fromkeys(f'PMC{i}' for i in range(50)), tmp_path/'out', web, base='http://127.0.0.1:9')
    assert 3 <= len(read_manifest(tmp_path/'out')) < 50


def test_a_full_disk_is_one_sentence(phantoms, bucket, web, tmp_path, monkeypatch):
    replace = os.replace
    def full(a, b):
        if str(a).endswith('.part'): raise OSError(28, 'No space left on device')
        return replace(a, b)
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OutputError, match='No space left'): get_articles(dict.fromkeys(ids(phantoms)), tmp_path/'out', web, base=bucket.url)
    monkeypatch.undo()
    assert {r['status'] for r in fetch(dict.fromkeys(ids(phantoms)), tmp_path/'out', web, base=bucket.url, **quiet).values()} == {'done'}


def test_a_cut_line_of_the_manifest_is_looked_at_again(phantoms, bucket, web, tmp_path, calm):
    out = tmp_path/'out'
    get_articles(dict.fromkeys(ids(phantoms)), out, web, base=bucket.url)
    text = (out/'manifest.jsonl').read_text()
    (out/'manifest.jsonl').write_text(text[:-40])
    bucket.asked.clear()
    get_articles(dict.fromkeys(ids(phantoms)), out, web, base=bucket.url, **quiet)
    assert tree(out) == calm and not [k for k in bucket.asked if k.startswith('PMC')], 'metadata only'
    (out/'manifest.jsonl').write_text('{"pmcid"\n' + text)
    with pytest.raises(ValueError, match='line 1'): get_articles({}, out, web)


def test_two_processes_do_not_share_a_folder(phantoms, bucket, web, tmp_path):
    import filelock
    (tmp_path/'out').mkdir()
    with filelock.FileLock(tmp_path/'out/.lock', is_singleton=False):
        with pytest.raises(ValueError, match='in use'): get_articles({}, tmp_path/'out', web)


# Choosing

class Entrez(LocalBucket):
    "A search of 25,000 articles, a hundred for each of 250 days, that refuses to hand out more than 9,999."
    def search(self, query):
        self.headers.append(query)
        import re
        from datetime import date
        m = re.search(r'(\d{4})/(\d\d)/(\d\d):(\d{4})/(\d\d)/(\d\d)\[pmcrdat\]', query['term'])
        days = range(250)
        if m:
            low, high = (date(*map(int, m.groups()[i:i+3])) for i in (0, 3))
            days = [k for k in days if low <= date.fromordinal(date(2021, 1, 1).toordinal() + k) <= high]
        found = [100*k + j + 1 for k in days for j in range(100)]
        return json.dumps({'esearchresult': {'count': str(len(found)), 'idlist': [str(i) for i in found[:int(query['retmax'])]],
                                             'warninglist': {'quotedphrasesnotfound': ['"x y"']}}}).encode()


def test_a_large_search_is_cut_by_date(phantoms, web):
    said = []
    with Entrez(phantoms) as b:
        found = search_pmc('x', web, url=f'{b.url}/esearch.fcgi', say=said.append)
        assert sorted(found, key=lambda i: int(i[3:])) == [f'PMC{i}' for i in range(1, 25_001)] and len(b.headers) < 60
        assert len(search_pmc('x', web, 12_345, f'{b.url}/esearch.fcgi', say=said.append)) == 12_345
        assert search_pmc('x', web, 3, f'{b.url}/esearch.fcgi', say=said.append) == ['PMC1', 'PMC2', 'PMC3']
    assert '"x y"' in said[0]


def test_entrez_may_answer_nonsense(phantoms, bucket, web):
    bucket.search = lambda q: json.dumps({'error': 'API rate limit exceeded'}).encode()
    with pytest.raises(NoAnswer, match='unreadable'): search_pmc('x', web, url=f'{bucket.url}/esearch.fcgi')
    bucket.search = lambda q: json.dumps({'esearchresult': {'ERROR': 'Search Backend failed'}}).encode()
    with pytest.raises(WebError, match='Backend'): search_pmc('x', web, url=f'{bucket.url}/esearch.fcgi')


def test_the_key_is_sent_and_not_kept(phantoms, bucket, web, tmp_path, monkeypatch):
    monkeypatch.setenv('NCBI_API_KEY', 'secret-key')
    get_pmc('lung', tmp_path/'out', web=web, base=bucket.url, entrez=f'{bucket.url}/esearch.fcgi', **quiet)
    assert bucket.headers[0]['api_key'] == 'secret-key'
    assert not any(b'secret-key' in p.read_bytes() for p in (tmp_path/'out').rglob('*') if p.is_file())


def test_the_selection_is_found_once(phantoms, bucket, web, tmp_path):
    how = dict(web=web, base=bucket.url, entrez=f'{bucket.url}/esearch.fcgi', **quiet)
    assert get_pmc('lung', tmp_path/'out', since='2020', limit=3, **how) == 0
    assert get_pmc('lung', tmp_path/'out', since='2020', limit=3, **how) == 0 and len(bucket.headers) == 1
    with pytest.raises(ValueError, match='another question'): get_pmc('lung', tmp_path/'out', since='2021', limit=3, **how)
    assert get_pmc('lung', tmp_path/'out', since='2021', limit=5, refresh=True, **how) == 0
    assert len(read_manifest(tmp_path/'out')) == 5


def test_an_inventory_is_kept_and_hashed_and_saves_the_listings(phantoms, bucket, web, tmp_path):
    bucket.inventory()
    how = dict(web=web, base=bucket.url, **quiet)
    assert get_pmc(out=tmp_path/'out', inventory='latest', **how) == 0
    listings = bucket.asked['']
    kept = tmp_path/'out/inventory/all.csv.gz'
    note = json.loads((tmp_path/'out/selection.json').read_text())
    assert note['inventory_sha256']['all.csv.gz'] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert listings == 1 and len(read_manifest(tmp_path/'out')) == N
    some = ids(phantoms)[:2]
    assert get_pmc(out=tmp_path/'two', inventory=str(kept), ids=[*some, 'PMC3'], **how) == 0
    assert {i: r['status'] for i, r in read_manifest(tmp_path/'two').items()} == {some[0]: 'done', some[1]: 'done', 'PMC3': 'missing'}
    assert get_pmc('lung', tmp_path/'query', inventory=str(kept), ids=[f'{some[0]}.1'], entrez=f'{bucket.url}/esearch.fcgi', **how) == 0
    assert len(read_manifest(tmp_path/'query')) == N and bucket.asked[''] == listings


def test_llava_meds_list_of_images(phantoms, bucket, web, tmp_path):
    a, b = ids(phantoms)[:2]
    name = lambda i, k: f'phantom-{i[3:]}-g00{k}.jpg'
    rows = [dict(pmc_tar_url=f'https://ftp.example.org/pub/pmc/oa_package/aa/bb/{i}.tar.gz', image_file_path=f'{i}/{n}', pair_id=p)
            for i, n, p in ((a, name(a, 1), '1_F1'), (a, name(a, 2), '1_F2'), (b, 'nowhere.jpg', '2_F1'), ('PMC5', 'x.jpg', '3_F1'))]
    urls = tmp_path/'image_urls.jsonl'
    urls.write_text('\n'.join(map(json.dumps, rows)))
    assert get_pmc(out=tmp_path/'out', image_urls=urls, web=web, base=bucket.url, **quiet) == 0
    found = read_jsonl(tmp_path/'out/pairs.jsonl')
    assert [f['image'] for f in found] == [f'{a}.1/{name(a, 1)}', f'{a}.1/{name(a, 2)}', None, None]
    assert 'no such file' in found[2]['reason'] and 'no version' in found[3]['reason']
    assert (tmp_path/'out'/found[0]['image']).is_file() and bucket.asked[f'{a}.1/{name(a, 3)}'] == 0
    assert [f['reason'] for f in pairs(urls, tmp_path/'nothing')] == ['not asked for yet']*4


def test_the_official_list_is_understood():
    from llava_med.core.runs import test_data as data_folder
    path = data_folder() and data_folder()/'llava_med/llava_med_image_urls_eval_2v.jsonl'
    if not path or not path.exists(): pytest.skip('needs LLAVA_MED_TESTDATA')
    rows = list(pubmed.read_image_urls(path))
    assert len(rows) == 50 and rows[0] == dict(pair_id='21139713_F0003', pmcid='PMC2988167', file='LI-27-196-g003.jpg')


# The commands and the catalogue

@pytest.fixture
def addresses(monkeypatch, bucket):
    "The real addresses stand for the bucket on this machine."
    return ['--base', bucket.url, '--entrez', f'{bucket.url}/esearch.fcgi', '--per-second', '1000']


def test_the_command_fetches_what_the_reader_reads(phantoms, bucket, tmp_path, addresses, capsys):
    from llava_med.lab.commands import main
    out = str(tmp_path/'pmc')
    assert main(['get', 'pmc', 'lung', 'radiograph', '--licence', 'CC BY', 'CC0', '--limit', '4', '--out', out, *addresses]) == 0
    assert bucket.headers[0]['term'].startswith('(lung radiograph) AND open_access[filter]')
    assert '4 done, 0 missing' in capsys.readouterr().out
    assert main(['figures', out, '--out', str(tmp_path/'figures.jsonl')]) == 0
    assert {r['pmcid'] for r in read_jsonl(tmp_path/'figures.jsonl')} == set(ids(phantoms)[:4])
    assert main(['get', '--ids', *ids(phantoms)[:2], '--out', str(tmp_path/'two'), *addresses]) == 0
    assert main(['get', '--ids', 'PMC1', '--out', str(tmp_path/'none'), *addresses]) == 1


@pytest.mark.parametrize('words, said, code', [
    (['pmc'], 'Say which articles', 1), (['nonsense'], 'Known: vqa_rad', 2), (['pmc', 'x', '--licence', 'MIT'], 'known are CC0', 1),
    (['pmc', 'x', '--since', 'May'], 'is not a date', 1), (['--ids', '10.1/x'], 'is not a PMC id', 1),
    (['pmc', 'x', '--image-urls', 'y'], 'leave the others away', 1),
    (['--ids', 'PMC1', '--journal', 'x'], 'filters of a QUERY', 1), (['pmc', 'x', '--per-second', '0'], 'greater than 0', 1),
    (['--inventory', 'nowhere.csv'], 'nowhere.csv', 1)])
def test_a_wrong_command_is_one_sentence(words, said, code, tmp_path, capsys):
    from llava_med.lab.commands import main
    assert main(['get', *words, '--out', str(tmp_path/'out')]) == code
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


def test_an_entry_goes_on_and_refuses_what_has_another_hash(phantoms, bucket, web, tmp_path):
    from llava_med.data.catalogue import Entry, File, get_entry
    data = bytes(range(256))*400
    bucket.objects['big.bin'] = data
    make = lambda sha: Entry('toy', 'a toy', '1 kB', 'CC0', 'none', 'https://example.org', (File('big.bin', f'{bucket.url}/big.bin', len(data), sha),))
    web.tries = 1
    bucket.faults['big.bin'] = ['short']
    with pytest.raises(NoAnswer): get_entry(make(hashlib.sha256(data).hexdigest()), tmp_path/'toy', web, **quiet)
    assert 0 < (tmp_path/'.toy.part/.big.bin.part').stat().st_size < len(data) and not (tmp_path/'toy').exists()
    get_entry(make(hashlib.sha256(data).hexdigest()), tmp_path/'toy', web, **quiet)
    assert (tmp_path/'toy/big.bin').read_bytes() == data and bucket.asked['big.bin'] == 2
    assert json.loads((tmp_path/'toy/source.json').read_text())['files']['big.bin']['bytes'] == len(data)
    with pytest.raises(WebError, match='sha256'): get_entry(make('0'*64), tmp_path/'other', web, **quiet)
    assert not (tmp_path/'other').exists() and not (tmp_path/'.other.part').exists()


def test_a_set_has_its_name_when_its_last_file_is_there(bucket, web, tmp_path):
    "The second file is gone: the first stays in the hidden folder, and a set of an older version is completed in its place."
    from llava_med.data.catalogue import Entry, File, get_entry
    bucket.objects |= {'one.json': b'[]', 'two.json': b'[1]'}
    files = lambda *names: Entry('toy', 'a toy', '1 kB', 'CC0', 'none', 'https://example.org/page', tuple(
        File(n, f'{bucket.url}/{n}', None, hashlib.sha256(bucket.objects.get(n, b'')).hexdigest()) for n in names))
    with pytest.raises(WebError, match='^toy/none.json: .* does not exist; the same command goes on.*example.org/page') as e:
        get_entry(files('one.json', 'none.json'), tmp_path/'toy', web, **quiet)
    assert str(e.value).count('\n') == 0 and not (tmp_path/'toy').exists() and (tmp_path/'.toy.part/one.json').is_file()
    get_entry(files('one.json', 'two.json'), tmp_path/'toy', web, **quiet)
    assert {p.name for p in (tmp_path/'toy').iterdir()} == {'one.json', 'two.json', 'source.json'} and not (tmp_path/'.toy.part').exists()
    assert bucket.asked['one.json'] == 1
    (tmp_path/'toy/source.json').unlink(); (tmp_path/'toy/two.json').unlink()
    get_entry(files('one.json', 'two.json'), tmp_path/'toy', web, **quiet)
    assert bucket.asked['one.json'] == 1 and (tmp_path/'toy/two.json').is_file()


class Hub(BaseHTTPRequestHandler):
    "The little of the hub that a snapshot needs: the files of one repository, as a list and one by one."
    files = {'config.json': b'{}', 'model.safetensors': b'weights'*1000, 'model.bin': b'the same again'}
    log_message = lambda *a: None

    def do_GET(self):
        path, found = urlsplit(self.path).path, None
        if path.startswith('/api/models/lab/toy/tree/'):
            found = json.dumps([dict(type='file', path=k, size=len(v), oid=md5(v)) for k, v in self.files.items()]).encode()
        elif path.startswith('/api/models/lab/toy'):
            found = json.dumps(dict(id='lab/toy', sha='a'*40, siblings=[{'rfilename': f} for f in self.files])).encode()
        elif path.startswith('/lab/toy/resolve/'): found = self.files.get(path.split('/')[-1])
        code = next((c for w, c in (('gone', 'RevisionNotFound'), ('closed', 'GatedRepo')) if w in path), 'RepoNotFound')
        if code != 'RepoNotFound': found = None
        self.send_response(200 if found is not None else 403 if code == 'GatedRepo' else 404)
        for k, v in {'Content-Length': len(found or b''), 'ETag': f'"{md5(found or b"")}"', 'X-Repo-Commit': 'a'*40,
                     **({} if found is not None else {'X-Error-Code': code})}.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command == 'GET': self.wfile.write((found or b'')[:len(found or b'')//2 if self.broken and path.endswith('model.safetensors') else None])

    do_HEAD, broken = do_GET, False


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_a_repository_comes_from_the_hub(hub, tmp_path):
    from llava_med.data.catalogue import Entry, get_entry
    entry = lambda repo: Entry('toy', 'a toy', '7 kB', 'MIT', 'none', 'https://example.org', repo=repo, patterns=('*.json', '*.safetensors'))
    get_entry(entry('lab/toy'), tmp_path/'toy', endpoint=hub, **quiet)
    assert {p.name for p in (tmp_path/'toy').iterdir() if p.is_file()} == {'config.json', 'model.safetensors', 'source.json'}
    assert (tmp_path/'toy/model.safetensors').read_bytes() == Hub.files['model.safetensors']
    with pytest.raises(WebError, match='does not exist on the hub'): get_entry(entry('lab/none'), tmp_path/'none', endpoint=hub, **quiet)
    with pytest.raises(WebError, match='cannot be fetched'): get_entry(entry('lab/toy'), tmp_path/'off', endpoint='http://127.0.0.1:9', **quiet)
    assert [p.name for p in tmp_path.iterdir()] == ['toy']


@pytest.mark.parametrize('change, says', [
    (dict(revision='gone'), r'lab/toy: the revision gone is gone from the hub; see https://example.org for the one that took its place'),
    (dict(revision='closed'), 'lab/toy: wants an account of the hub.*hf auth login'),
    (dict(patterns=('*.json',)), r'lab/toy: holds no weights among \*.json; see https://example.org')])
def test_what_the_hub_refuses_is_one_sentence_and_leaves_nothing(hub, tmp_path, change, says):
    from llava_med.data.catalogue import Entry, get_entry
    entry = Entry('toy', 'a toy', '7 kB', 'MIT', 'none', 'https://example.org', repo='lab/toy', **{'patterns': ('*.json', '*.safetensors'), **change})
    with pytest.raises(WebError, match=says) as e: get_entry(entry, tmp_path/'toy', endpoint=hub, **quiet)
    assert str(e.value).count('\n') == 0 and not (tmp_path/'toy').exists()


def test_a_transfer_from_the_hub_that_breaks_off_goes_on(hub, tmp_path, monkeypatch):
    from llava_med.data.catalogue import Entry, get_entry
    entry = Entry('toy', 'a toy', '7 kB', 'MIT', 'none', 'https://example.org', repo='lab/toy', patterns=('*.json', '*.safetensors'))
    monkeypatch.setattr(Hub, 'broken', True)
    with pytest.raises(WebError, match='lab/toy: cannot be fetched .*goes on where it was') as e: get_entry(entry, tmp_path/'toy', endpoint=hub, **quiet)
    assert str(e.value).count('\n') == 0 and not (tmp_path/'toy').exists()
    monkeypatch.setattr(Hub, 'broken', False)
    get_entry(entry, tmp_path/'toy', endpoint=hub, **quiet)
    assert (tmp_path/'toy/model.safetensors').read_bytes() == Hub.files['model.safetensors'] and not (tmp_path/'.toy.part').exists()


# Killed

FETCH = '''
import sys
from llava_med.data.pubmed import get_pmc
from llava_med.data.web import Web
print('ready', flush=True)
sys.exit(get_pmc(out=sys.argv[1], ids=[sys.argv[2]], workers=3, base=sys.argv[3], web=Web(per_second=400, backoff=.05)))
'''


def test_killed_ten_times_it_leaves_what_an_undisturbed_run_leaves(phantoms, bucket, web, tmp_path, calm):
    bucket.delay = .04
    (tmp_path/'ids.txt').write_text('\n'.join(ids(phantoms)))
    (tmp_path/'fetch.py').write_text(FETCH)
    def start():
        env = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'LLAVA_MED_PLAIN': '1'}
        p = subprocess.Popen([sys.executable, tmp_path/'fetch.py', tmp_path/'out', tmp_path/'ids.txt', bucket.url], env=env,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert p.stdout.readline() == 'ready\n', p.stderr.read()
        return p
    rng, in_work = random.Random(0), 0
    for _ in range(10):
        p = start()
        time.sleep(rng.uniform(.02, .25))
        in_work += p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.communicate()
        for d in (tmp_path/'out').glob('PMC*'): assert {k: v for k, v in calm.items() if k.startswith(d.name)} == \
            {f'{d.name}/{k}': v for k, v in tree(d).items()}, 'a folder with the name of an article is whole'
    p = start()
    p.communicate()
    assert p.returncode == 0 and in_work >= 8
    left = {k: v for k, v in tree(tmp_path/'out').items() if k != 'ids.txt'}
    assert left == calm
    files = [k for k in calm if k.endswith(('.xml', '.jpg'))]
    assert sum(bucket.served[k] for k in files) <= len(files) + 10*3, 'only files in flight are asked for again'


def test_interrupted_it_says_so_and_goes_on(phantoms, bucket, tmp_path):
    bucket.delay = .5   # long enough that the signal comes before the end on a busy machine, too
    out, code = tmp_path/'out', 'import sys; from llava_med.lab.commands import main; print("ready", flush=True); sys.exit(main(sys.argv[1:]))'
    words = ['get', '--ids', *ids(phantoms), '--out', str(out), '--base', bucket.url, '--workers', '2']
    start = lambda: subprocess.Popen([sys.executable, '-c', code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                     env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'LLAVA_MED_PLAIN': '1'})
    p = start()
    p.stdout.readline()
    while p.poll() is None and not list(out.glob('PMC*')): time.sleep(.02)
    p.send_signal(signal.SIGINT)
    said = p.communicate()[1]
    assert p.returncode == 130 and 'goes on where it was' in said and 'Traceback' not in said
    assert 0 < len(list(out.glob('PMC*'))) < N
    bucket.delay = 0
    p = start()
    assert f'{N} done' in p.communicate()[0] and p.returncode == 0
