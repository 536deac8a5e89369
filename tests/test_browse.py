"What the cells of 03e_pictures cannot say: that the sample page is whole, holds nothing foreign, and obeys the keyboard."
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava_med.data.conversations import DOMAINS
from llava_med.data.browse import choose, modality_rows, openings, sample_page

NASTY = '</article><script>alert(1)</script><img src="https://example.org/x.png" onerror=alert(1)> & \x00\x1b "quoted"'
BROWSER = '''
const html = require('fs').readFileSync(process.argv[1], 'utf8'), script = html.match(/<script>([\\s\\S]*)<\\/script>/)[1], keys = {}, said = [];
const articles = [...html.matchAll(/<article tabindex="-1" id="(r\\d+)"[^>]*data-modality="([^"]*)"/g)].map(m => ({id: m[1], dataset: {modality: m[2]},
    hidden: false, focus() { document.activeElement = {closest: () => this} }, scrollIntoView() {}}));
const element = () => ({value: '', hidden: true, textContent: '', on: {}, addEventListener(e, f) { this.on[e] = f }});
const els = Object.fromEntries(['tools', 'modality', 'count', 'next', 'previous'].map(k => [k, element()]));
global.document = {querySelectorAll: () => articles, getElementById: i => els[i], activeElement: {closest: () => null}, addEventListener(e, f) { keys[e] = f }};
eval(script);
const press = (k, more) => { keys.keydown({key: k, target: {}, ...more}); said.push(document.activeElement.closest('article')?.id) };
press('j'); press('j'); press('j'); press('k'); press('j', {ctrlKey: true}); els.next.on.click(); press('x'); els.previous.on.click(); press('x');
els.modality.value = 'mri'; els.modality.on.change(); press('j'); for (let i = 0; i < 9; i++) keys.keydown({key: 'j', target: {}}); press('x');
console.log(JSON.stringify({said, count: els.count.textContent, tools: els.tools.hidden}));
'''


class Page(HTMLParser):
    "Open tags must be closed in order; addresses and scripts are noted."
    def __init__(self, text):
        super().__init__(); self.open, self.addresses, self.scripts = [], [], 0
        self.feed(text); self.close()
        assert not self.open
    def handle_starttag(self, tag, attrs):
        if tag not in ('meta', 'img'): self.open.append(tag)
        self.scripts += tag == 'script'
        assert not [k for k, _ in attrs if k.startswith('on')]
        self.addresses += [v for k, v in attrs if k in ('src', 'href')]
    def handle_endtag(self, tag): assert self.open.pop() == tag


@pytest.fixture
def data(tmp_path):
    "Ten figures of two modalities, every word of them hostile, and a conversation about each."
    figures, talks = [], []
    for i in range(10):
        Image.new('RGB', (900, 500), (i*20, 0, 0)).save(tmp_path/f'{i}.jpg')
        figures.append(dict(id=f'{i}{NASTY}', label=NASTY, caption=NASTY, licence=NASTY, source=NASTY, lang='en"', image=f'{i}.jpg',
                            mentions=[dict(text=NASTY, section=NASTY)], modalities={'mri': i % 2 == 0, 'gross': i % 2 == 1}))
        talks.append(dict(id=NASTY, image=f'{i}.jpg', domain=figures[-1]['modalities'], generator=dict(name=NASTY, saw=[NASTY]),
                          conversations=[{'from': 'human', 'value': f'<image>\n{NASTY}'}, {'from': 'gpt', 'value': NASTY}]))
    return figures, talks


def test_the_page_is_whole_and_holds_nothing_foreign(data, tmp_path):
    figures, talks = data
    assert sample_page(tmp_path/'sample.html', figures, talks, tmp_path, title=NASTY) == 10
    text = (tmp_path/'sample.html').read_text()
    page = Page(text)
    assert page.scripts == 1 and len(page.addresses) == 10 and all(a.startswith('data:image/jpeg;base64,') for a in page.addresses)
    assert "default-src 'none'" in text and '\x00' not in text and '\x1b' not in text
    assert text.count('&lt;script&gt;alert(1)') > 60 and 'width="384"' in text


@pytest.mark.skipif(not shutil.which('node'), reason='node is not installed')
def test_the_page_obeys_the_keyboard(data, tmp_path):
    sample_page(tmp_path/'sample.html', *data, tmp_path)
    done = subprocess.run(['node', '-e', BROWSER, str(tmp_path/'sample.html')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got['said'][:7] == ['r1', 'r2', 'r3', 'r2', 'r2', 'r3', 'r2'], got
    shown = [i for i, f in enumerate(choose(data[0], 24), 1) if f['modalities']['mri']]
    assert got['count'] == '5 shown' and got['tools'] is False and got['said'][8] == f'r{shown[-1]}'


def test_a_sample_takes_turns_and_is_the_same_for_a_seed(data):
    figures = [*data[0], *({**f, 'id': f'more{i}', 'modalities': {'mri': True}} for i, f in enumerate(data[0]*9))]
    sample = choose(figures, 8, 3)
    assert [f['modalities']['mri'] for f in sample] == [True, False]*4
    assert [f['id'] for f in sample] == [f['id'] for f in choose(figures, 8, 3)] != [f['id'] for f in choose(figures, 8, 4)]
    assert len(choose(figures, 1000)) == 100 and len({id(f) for f in choose(figures, 1000)}) == 100


def test_counts_are_those_of_the_files(data):
    rows = {r['modality']: (r['images'], r['questions']) for r in modality_rows(data[1]*3)}
    assert rows == {**dict.fromkeys(DOMAINS, (0, 0)), 'mri': (5, 15), 'gross': (5, 15)}
    assert sum(openings(['a b', 'a c', '']).values()) == 3
