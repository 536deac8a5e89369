"""Malformed inputs, made by a seed. Each knows the file and the record that it damages, so that the test can ask:
was it named, was the rest kept, is the total right?"""
import io
import json
import pickle
import random
import re
import tarfile
import traceback
import zipfile
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from llava_med.core.runs import LFS_POINTER, read_json, read_jsonl
from llava_med.data.articles import read_articles
from llava_med.data.conversations import read_records
from llava_med.data.filters import HeldOut
from llava_med.data.images import open_image
from llava_med.data.llava_files import read_llava_file, training_records
from llava_med.data.vqa_readers import open_vqa
from llava_med.evaluate.answer_files import read_answers
from llava_med.evaluate.score_rows import score_files

N = 12            # records of a file
EACH = 14         # malformed inputs of a reader
AT_LEAST = 200    # malformed inputs in all


# Records that are sound, and files of them

def picture(i): return Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8))


def png(i, fmt='PNG', **kw):
    f = io.BytesIO()
    picture(i).save(f, fmt, **kw)
    return f.getvalue()


def item(i):
    return dict(id=f'rec-{i}z', images=[f'{i}.png'], question=f'Is shadow {i} large?', answer='no', answer_type='CLOSED', options=[],
                tags=dict(modality='ct', organ=None, question_type='size'), split='test', regions=[dict(name='a', box=[0, 0, .5, .5])], twin_of=None, source='mine')


def choice(i): return item(i) | dict(options=[f'left {i}', f'right {i}'], answer='B')


def rad(i): return dict(qid=f'{500 + i}', image_name=f'{i}.png', question=f'Is shadow {i} large?', answer='No', answer_type='CLOSED ', phrase_type='test_freeform',
                        question_type='SIZE', image_organ='CHEST')


def slake(i): return dict(qid=500 + i, img_name=f'{i}.png', question=f'Is shadow {i} large?', answer='No', answer_type='CLOSED', q_lang='en', modality='CT',
                          location='Lung', content_type='Size')


def pathvqa(i): return dict(image=f'test_{i:04}', question=f'is shadow {i} large?', answer='no')


def lxmert(i): return dict(img_id=f'test_{i:04}', sent=f'is shadow {i} large?', label={'no': 1}, question_id=i, answer_type='yes/no', question_type='is')


def pmc(i): return {'Figure_path': f'{i}.png', 'Question': f'Which side is shadow {i}?', 'Answer': 'B', 'Choice A': f'A:left {i}', 'Choice B': f'B:right {i}',
                    'Choice C': 'C:both', 'Choice D': 'D:none'}


def talk(i): return dict(id=f'rec-{i}z', image=f'{i}.png', conversations=[{'from': 'human', 'value': f'<image>\nIs shadow {i} large?'}, {'from': 'gpt', 'value': f'No, {i} is small.'}])


def asked(i): return talk(i) | dict(answer_type='CLOSED')


def row(i): return dict(image=f'{i}.png', question=f'Is shadow {i} large?', answer='no', modality='CT', split='test')


def record(i): return dict(question_id=f'rec-{i}z', image_path=f'{i}.png', question=f'Which side is shadow {i}?', gt_answer=f'right {i}', option_A=f'left {i}', option_B=f'right {i}', modality_type='CT')


def answer(i): return dict(question_id=f'rec-{i}z', prompt=f'Is shadow {i} large?', text=f'no {i}', model='mn'[i % 2])   # of two models


def caption(i): return dict(pair_id=f'{1000 + i}_F1', fig_caption=f'Shadow {i}.', fig_id='F1', fig_label='Figure 1', graphic_ref=f'PMC{i}/a', pmid=f'{1000 + i}', in_text_mention=[dict(tokens=f'Figure 1 shows {i} .', entities=[])],
                            domain=dict(chest_xray=True, mri=False, histology=False, gross=False, ct_scan=False))


def judged(i): return dict(question_id=i, image=f'{i}.png', pair_id=f'{1000 + i}_F1', text=f'<image>\nWhat is shadow {i}?', gpt4_answer=f'It is {i}.', fig_caption=f'Shadow {i}.', in_text_mention=None,
                           domain=dict(chest_xray=True), type='conversation', fig_label='Figure 1')


def held(i): return dict(id=f'rec-{i}z', image=f'{i}.png', question=f'What is shadow {i}?', answer='a')


def as_json(rows): return json.dumps(rows, ensure_ascii=False).encode()


def as_lines(rows): return '\n'.join(json.dumps(r, ensure_ascii=False) for r in rows).encode()


def as_csv(rows):
    names = list(dict.fromkeys(k for r in rows for k in r))
    cells = lambda vs: ','.join('"' + str(v).replace('"', '""') + '"' for v in vs)
    return '\n'.join([cells(names), *(cells(r.get(k, '') for k in names) for r in rows)]).encode()


def as_parquet(rows):
    import pyarrow as pa, pyarrow.parquet as pq
    f = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), f)
    return f.getvalue()


def as_sheet(rows):
    import openpyxl
    names, book, f = list(dict.fromkeys(k for r in rows for k in r)), openpyxl.Workbook(), io.BytesIO()
    book.active.append(names)
    for r in rows: book.active.append([r.get(k) for k in names])
    book.save(f)
    return f.getvalue()


def figure_xml(i): return (f'<fig id="f{i}"><label>Figure {i + 1}</label><caption><p>Shadow {i} of a lung.</p></caption><graphic xlink:href="g{i}"/></fig>')


def article(figs): return ('<?xml version="1.0"?><article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta><article-id pub-id-type="pmc">PMC77</article-id></article-meta></front>'
                           '<body>' + ''.join(figs) + '</body></article>').encode()


# Readers: what they are given, how they are asked, what they say

def as_text(x): return json.dumps(x, sort_keys=True, default=str, ensure_ascii=False)


def read_set(path):
    said = []
    found = open_vqa(path, part=True, left_out=said, say=said.append)
    return found['items'], [path.name, *said]


def read_training(path):
    found, said = training_records(path)
    return found, [said]


def read_llava(path):
    faults = []
    found = list(read_llava_file(path, faults))
    return found, [f'{path.name}: {f["record"]}: {f["reason"]}' for f in faults]


def read_held(path):
    found = HeldOut([path])
    return [n.split(': ')[1] for n in found.seen.names], found.notes


def read_figures(path):
    said = []
    return [{k: v for k, v in r.items() if k != 'source'} for r in read_articles([path], lambda source, why: said.append(why))], said


def only(read): return lambda path: (read(path), [])


@dataclass
class Reader:
    "A reader, sound records, and how a file is made of them."
    name:str
    file:str           # name of the file
    good:object        # number → record
    write:object       # records → bytes
    read:object        # path → results in order, sentences
    pictures:str='{}.png'
    names:object=lambda i: ()   # what a record may be called beside its number
    may_be_empty:bool=False   # whether a file without a record is right
    optional:tuple=()  # fields of a record that need not be there: without one a tag is empty, and nothing else


vqa_id = lambda *forms: lambda i: tuple(f.format(i) for f in forms)
READERS = [
    Reader('items', 'test.json', item, as_json, read_set, names=vqa_id('rec-{}z'), optional=('regions', 'tags')),
    Reader('items in lines', 'test.jsonl', item, as_lines, read_set, names=vqa_id('rec-{}z'), optional=('regions', 'tags')),
    Reader('items with options', 'test.json', choice, as_json, read_set, names=vqa_id('rec-{}z'), optional=('regions', 'tags')),
    Reader('VQA-RAD', 'testset.json', rad, as_json, read_set, names=vqa_id('vqa_rad-test-{}'), optional=('question_type', 'image_organ', 'phrase_type')),
    Reader('SLAKE', 'test.json', slake, as_json, read_set, 'imgs/{}.png', names=lambda i: (f'slake-{500 + i}',), optional=('location', 'modality', 'content_type', 'q_lang')),
    Reader('PathVQA', 'test_qa.pkl', pathvqa, lambda rows: pickle.dumps(rows, 4), read_set, 'images/test/test_{:04}.jpg', names=lambda i: (f'pathvqa-test_{i:04}',)),
    Reader('PathVQA with types', 'test_vqa.pkl', lxmert, lambda rows: pickle.dumps(rows, 2), read_set, 'images/test/test_{:04}.jpg', names=lambda i: (f'pathvqa-test_{i:04}',), optional=('question_type', 'question_id', 'answer_type')),
    Reader('PMC-VQA', 'test_2.csv', pmc, as_csv, read_set, names=vqa_id('pmc_vqa-test-{}'), optional=('Choice C', 'Choice D')),
    Reader('LLaVA-Med VQA', 'test.json', asked, as_json, read_set, names=vqa_id('llava_med-test-{}'), optional=('id',)),
    Reader('table', 'test.csv', row, as_csv, read_set, names=vqa_id('table-{}'), optional=('modality',)),
    Reader('records', 'test.json', record, as_json, read_set, names=vqa_id('rec-{}z'), optional=('modality_type', 'question_id')),
    Reader('records in lines', 'test.jsonl', record, as_lines, read_set, names=vqa_id('rec-{}z'), optional=('modality_type', 'question_id')),
    Reader('parquet', 'test-00000-of-00001.parquet', row, as_parquet, read_set, names=vqa_id('test_00000_of_00001-{}'), optional=('modality',)),
    Reader('answers', 'answers.json', answer, as_json, only(read_answers), names=vqa_id('rec-{}z'), optional=('prompt', 'question_id', 'text')),
    Reader('answers in lines', 'answers.jsonl', answer, as_lines, only(read_answers), names=vqa_id('rec-{}z'), optional=('prompt', 'question_id', 'text')),
    Reader('answers in a table', 'answers.csv', answer, as_csv, only(read_answers), names=vqa_id('rec-{}z'), optional=('prompt', 'question_id', 'text')),
    Reader('answers in a sheet', 'answers.xlsx', answer, as_sheet, only(read_answers), names=vqa_id('rec-{}z'), optional=('prompt', 'question_id', 'text')),
    Reader('conversations', 'talks.json', talk, as_json, read_training, names=vqa_id('rec-{}z'), optional=('id',)),
    Reader('conversations in lines', 'talks.jsonl', talk, as_lines, read_training, names=vqa_id('rec-{}z'), optional=('id',)),
    Reader('conversations, all', 'talks.json', talk, as_json, only(read_records), names=vqa_id('rec-{}z'), may_be_empty=True),
    Reader('captions', 'captions.json', caption, as_json, read_llava, names=lambda i: (f'{1000 + i}_F1',), optional=('graphic_ref', 'fig_label', 'fig_id', 'domain', 'pmid', 'in_text_mention')),
    Reader('judged questions', 'questions.jsonl', judged, as_lines, read_llava, names=lambda i: (f'{1000 + i}_F1', f': {i}:'), optional=('fig_label', 'fig_caption', 'in_text_mention', 'domain')),
    Reader('evaluation set', 'held.json', held, as_json, read_held, names=vqa_id('rec-{}z', '{}.png')),
    Reader('figures', 'a.xml', figure_xml, article, read_figures, names=lambda i: (f'f{i}', 'line 1')),
    Reader('JSON', 'x.json', item, as_json, only(read_json), names=vqa_id('rec-{}z')),
    Reader('JSON Lines', 'x.jsonl', item, as_lines, only(read_jsonl), names=vqa_id('rec-{}z'), may_be_empty=True)]


# Mutations: (bytes, record or None for the whole file, whether it may be read as if sound, what the record may show)

@dataclass
class Malformed:
    what:str                # what was done
    data:bytes
    record:int|None=None    # the record that is damaged; None: the whole file
    value:object=...        # what stands in it now; ... where nothing was put into it
    name:str=''             # the field that is damaged
    after:bool=True         # whether what follows the record can still be read


OTHERS = (None, True, 7, 3.5, [], ['odd-x9'], [['odd-x9']], {}, {'a': 1}, 'odd-x9', '', float('nan'), -123456, 10**30)


def set_field(reader, rng, rows, k, value, what):
    name = rng.choice(list(rows[k]))
    if value is Ellipsis: value = rng.choice([v for v in OTHERS if type(v) is not type(rows[k][name]) or v != rows[k][name]])
    rows[k] = rows[k] | {name: value}
    return Malformed(f'{what} {name} = {str(value)[:30]!r}', reader.write(rows), k, value, name)


def swap(reader, rng, rows, k): return set_field(reader, rng, rows, k, ..., 'swap')


def empty(reader, rng, rows, k): return set_field(reader, rng, rows, k, rng.choice(['', [], {}, '  ']), 'empty')


def huge(reader, rng, rows, k): return set_field(reader, rng, rows, k, rng.choice(['x' * 300_000, 10**40, 'é' * 70_000]), 'huge')


def deep(reader, rng, rows, k):
    value = []
    for _ in range(200): value = [value]
    return set_field(reader, rng, rows, k, value, 'deep')


def rename(reader, rng, rows, k):
    name = rng.choice(list(rows[k]))
    rows[k] = {n + ('_old' if n == name else ''): v for n, v in rows[k].items()}
    return Malformed(f'rename {name}', reader.write(rows), k, rows[k], name)


def nest(reader, rng, rows, k):
    rows[k] = rng.choice([[rows[k]], {'record': rows[k]}])
    return Malformed('nest', reader.write(rows), k, rows[k])


def scalar(reader, rng, rows, k):
    rows[k] = rng.choice([None, 5, 'text', True, []])
    return Malformed(f'scalar {rows[k]!r}', reader.write(rows), k, rows[k])


def repeat(reader, rng, rows, k):
    rows.insert(k, rows[k])
    return Malformed('repeat', reader.write(rows), k)


def key_twice(reader, rng, rows, k):
    name, text = rng.choice(list(rows[k])), json.dumps(rows[k], ensure_ascii=False)
    data, old = reader.write(rows), text.encode()
    assert data.count(old) == 1
    return Malformed(f'key {name} twice', data.replace(old, (text[:-1] + ', ' + json.dumps(name) + ': "other"}').encode()), k)


def place_of(reader, rows, k):
    "Where record k begins and ends in the file."
    before = len(reader.write(rows[:k])) if k else 0
    return before, len(reader.write(rows[:k + 1]))


def cut(reader, rng, rows, k):
    a, b = place_of(reader, rows, k)
    return Malformed('truncate', reader.write(rows)[:rng.randrange(a + 3, b - 3)], k, after=False)


def cut_anywhere(reader, rng, rows, k):
    data = reader.write(rows)
    return Malformed('truncate', data[:rng.randrange(1, len(data) - 4)])


def control(reader, rng, rows, k):
    a, b = place_of(reader, rows, k)
    data, at = reader.write(rows), (a + b) // 2
    return Malformed('control character', data[:at] + b'\0' + data[at:], k)


def commas(reader, rng, rows, k):
    a, b = place_of(reader, rows, k)
    data = reader.write(rows)
    at = data.index(b', "', a + 2)
    return Malformed('two commas', data[:at] + b',' + data[at:], k)


def latin(reader, rng, rows, k):
    text, (a, b) = reader.write(rows), place_of(reader, rows, k)
    at = text.index(b'hadow', a)
    return Malformed('one byte of Latin-1', text[:at] + b'\xe9' + text[at:], k)


def encoded(reader, rng, rows, k):
    kind = rng.choice(['utf-16', 'utf-8-sig', 'utf-32', 'utf-16-le'])
    return Malformed(f'encode {kind}', reader.write(rows).decode().encode(kind), k)


def pointer(reader, rng, rows, k): return Malformed('pointer', LFS_POINTER + b'.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n')


def nothing(reader, rng, rows, k): return Malformed('empty file', rng.choice([b'', b'\n', b' ']))


def packed(reader, rng, rows, k):
    import gzip
    return Malformed('compressed', gzip.compress(reader.write(rows), mtime=0))


def long_row(reader, rng, rows, k):
    lines = reader.write(rows).split(b'\n')
    lines[k + 1] += b',"more"'
    return Malformed('a cell too many', b'\n'.join(lines), k)


def short_row(reader, rng, rows, k):
    lines = reader.write(rows).split(b'\n')
    lines[k + 1] = lines[k + 1].split(b',')[0]
    return Malformed('cells too few', b'\n'.join(lines), k)


def open_quote(reader, rng, rows, k):
    lines = reader.write(rows).split(b'\n')
    lines[k + 1] = lines[k + 1][:-1]
    return Malformed('an open quote', b'\n'.join(lines), k)


def text_cell(reader, rng, rows, k): return set_field(reader, rng, rows, k, rng.choice(['', ' ', 'x' * 30_000, 'é"\n', '[]']), 'cell')


def two_columns(reader, rng, rows, k):
    head, _, rest = reader.write(rows).partition(b'\n')
    names = head.split(b',')
    return Malformed('two columns of one name', b','.join([names[1], *names[1:]]) + b'\n' + rest)


ON_JSON = (swap, swap, swap, empty, huge, deep, rename, rename, nest, scalar, repeat, key_twice, cut, control, commas, latin, encoded, pointer, nothing, packed)
ON_PICKLE = (swap, swap, empty, rename, nest, scalar, repeat, cut_anywhere, pointer, nothing)
ON_CSV = (text_cell, text_cell, repeat, long_row, short_row, open_quote, latin, encoded, pointer, nothing, two_columns, packed)
ON_TABLE = (text_cell, repeat, cut_anywhere, pointer, nothing)
ON_XML = (cut, encoded, pointer, nothing, control, latin)


def mutations(reader):
    if reader.write in (as_json, as_lines): return ON_JSON
    if reader.write is as_csv: return ON_CSV
    if reader.write is article: return ON_XML
    return ON_TABLE if reader.write in (as_parquet, as_sheet) else ON_PICKLE


# The question

def is_named(reader, case, path, words):
    "Whether a sentence names the file and the record that was damaged."
    if path.name not in words: return False
    if case.record is None: return True
    k = case.record
    value = ' '.join(str(case.value).split())
    if len(value) > (0 if isinstance(case.value, str) else 3) and value[:60] in words or 'odd-x9' in value and 'odd-x9' in words: return True
    numbers = rf'(row|record|line) ({k}|{k + 1}|{k + 2})\b'
    return bool(re.search(numbers, words)) or any(n in words for n in reader.names(k))


def shown(case, new):
    "Whether what came of a damaged record holds what stands in it now, as it is or as a text."
    if case.value is ...: return False
    if f'"{case.name}": {as_text(case.value)}' in new or as_text(case.value) == new: return True
    if isinstance(case.value, list) and len(case.value) == 1 and isinstance(case.value[0], str): return as_text(case.value[0]) in new   # a list of one
    if isinstance(case.value, (list, dict)) or not str(case.value or '').strip(): return bool(case.value) and as_text(case.value) in new
    if isinstance(case.value, bool): return as_text(str(case.value)) in new
    plain = ' '.join(str(case.value).split())
    return as_text(plain)[1:-1] in new or str(case.value) in new


NUMBERED = ('id', 'row')   # a record that comes twice moves those behind it


def unnumbered(text):
    found = json.loads(text)
    return as_text({k: v for k, v in found.items() if k not in NUMBERED} if isinstance(found, dict) else found)


def outcome(reader, case, path, sound):
    "What became of a malformed input: refused, named, kept as it is, or a fault."
    path.write_bytes(case.data)
    try: found, said = reader.read(path)
    except (ValueError, OSError) as e:
        words = str(e)
        if '\n' in words.strip() or len(words) > 1000: return 'no single sentence', words
        return ('refused', words) if is_named(reader, case, path, words) else ('not named', words)
    except Exception: return 'traceback', traceback.format_exc()
    found, words, k = list(map(as_text, found)), ' '.join(map(str, said)), case.record
    if case.what == 'repeat': found, sound = list(map(unnumbered, found)), list(map(unnumbered, sound))
    named = is_named(reader, case, path, words)
    if k is None:
        if found: return 'invented', found[0][:300]
        if reader.may_be_empty and not case.data.strip(): return 'read as it was', words
        return ('left out and named', words) if named else ('silent loss', words)
    rest = Counter(sound[:k] + sound[k + 1:]*case.after)
    if lost := rest - Counter(found): return 'rest lost', f'{sorted(lost)[:1]} {words}'
    new = list((Counter(found) - rest).elements())
    if not new: return ('left out and named', words) if named else ('silent loss', words)
    if set(new) == {sound[k]}: return 'read as it was', words
    if named: return 'named', words
    if shown(case, ' '.join(new)): return 'kept as written', new[0][:300]
    if case.name in reader.optional and len(new) == 1: return 'kept without a tag', new[0][:300]
    return 'silent change', f'{new[0][:400]} {words}'


GOOD = {'refused', 'left out and named', 'named', 'read as it was', 'kept as written', 'kept without a tag'}


def prepared(folder, reader):
    "A folder with the images of a reader's records, and what it says of the sound file."
    folder.mkdir(parents=True)
    for i in range(N):
        p = folder/reader.pictures.format(i)
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(png(i, 'JPEG' if p.suffix == '.jpg' else 'PNG'))
    path = folder/reader.file
    path.write_bytes(reader.write([reader.good(i) for i in range(N)]))
    found, _ = reader.read(path)
    assert len(found) == N
    return path, list(map(as_text, found))


def cases(reader, seed=0):
    "Malformed inputs of one reader."
    known = mutations(reader)
    for n in range(EACH):
        rng = random.Random(f'{seed} {reader.name} {n}')
        make = known[n % len(known)] if n < len(known) else rng.choice(known)
        yield make(reader, rng, [reader.good(i) for i in range(N)], rng.randrange(1, N - 1))


def trial(folder, readers=READERS, seed=0):
    "Outcomes of all malformed inputs: (reader, what was done, outcome, words)."
    out = []
    for reader in readers:
        path, sound = prepared(folder/re.sub(r'\W', '_', reader.name), reader)
        for case in cases(reader, seed): out.append((reader.name, case.what, *outcome(reader, case, path, sound)))
    return out


# Images and packages: the whole file is damaged, so the picture is the same or refused

def dicom():
    import pydicom
    from pydicom.data import get_testdata_file
    f = io.BytesIO()
    pydicom.dcmwrite(f, pydicom.dcmread(get_testdata_file('CT_small.dcm', download=False)))
    return f.getvalue()


def chunk(kind, data):
    import zlib
    return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')


def beside_png(data, rng):
    "Megabytes of text, a broken note, a broken profile or a text whose sum is wrong, before the pixels."
    at = 33   # behind the header
    new = rng.choice([chunk(b'tEXt', b'k\0' + b'x' * 2_000_000), chunk(b'eXIf', b'Exif\0\0 no note'), chunk(b'iCCP', b'p\0\0 no profile'),
                      chunk(b'tEXt', b'k\0text')[:-4] + b'\0\0\0\0', chunk(b'zTXt', b'k\0\0 no stream'), chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + b'y' * 2_000_000)])
    return data[:at] + new + data[at:]


def beside_jpeg(data, rng):
    note = rng.choice([b'Exif\0\0 no note', b'http://ns.adobe.com/xap/1.0/\0<x', b'ICC_PROFILE\0\1\1 no profile', b'MPF\0 no index'])
    return data[:2] + b'\xff' + bytes([rng.choice([0xe1, 0xe2])]) + (len(note) + 2).to_bytes(2, 'big') + note + data[2:]


KINDS = dict(png=lambda: png(3), jpg=lambda: png(3, 'JPEG'), tif=lambda: png(3, 'TIFF'), gif=lambda: png(3, 'GIF'), bmp=lambda: png(3, 'BMP'), webp=lambda: png(3, 'WEBP'), dcm=dicom)


def image_cases(kind, seed=0):
    "(what, bytes, whether the picture must be read) of malformed images of one kind."
    rng, good = random.Random(f'{seed} {kind}'), KINDS[kind]()
    yield 'pointer', LFS_POINTER + b'.github.com/spec/v1\n', False
    yield 'empty', b'', False
    yield 'web page', b'<html>Not found</html>', False
    yield 'truncate', good[:rng.randrange(12, len(good) * 9 // 10)], False
    yield 'truncate', good[:rng.randrange(12, len(good) * 9 // 10)], False
    if kind == 'png':
        for _ in range(6): yield 'beside the pixels', beside_png(good, rng), True
    if kind == 'jpg':
        for _ in range(6): yield 'beside the pixels', beside_jpeg(good, rng), True


def image_outcome(path, data, whole, good):
    path.write_bytes(data)
    try: found = open_image(path)
    except ValueError as e:
        words = str(e)
        if whole: return 'pixels lost', words
        return ('refused', words) if path.name in words and '\n' not in words else ('not named', words)
    except Exception: return 'traceback', traceback.format_exc()
    return ('read as it was', '') if found.tobytes() == good.tobytes() else ('silent change', '')


def packages(folder):
    "A package of an article with its pictures, in two kinds of archive."
    figs, files = [figure_xml(i) for i in range(N)], {f'g{i}.png': png(i) for i in range(N)}
    files = {'PMC77/a.nxml': article(figs)} | {f'PMC77/{n}': d for n, d in files.items()}
    with tarfile.open(folder/'p.tar.gz', 'w:gz') as t:
        for n, d in files.items():
            info = tarfile.TarInfo(n)
            info.size = len(d)
            t.addfile(info, io.BytesIO(d))
    with zipfile.ZipFile(folder/'p.zip', 'w') as z:
        for n, d in files.items(): z.writestr(n, d)
    return folder/'p.tar.gz', folder/'p.zip'


def package_cases(data, seed=0):
    rng = random.Random(seed)
    yield 'pointer', LFS_POINTER + b'.github.com/spec/v1\n'
    yield 'empty', b''
    for _ in range(8): yield 'truncate', data[:rng.randrange(4, len(data) - 4)]


def others(folder, seed=0):
    "Outcomes of malformed images and packages."
    out = []
    for kind in KINDS:
        path = folder/f'image.{kind}'
        path.write_bytes(KINDS[kind]())
        good = open_image(path)
        for what, data, whole in image_cases(kind, seed): out.append((kind, what, *image_outcome(path, data, whole, good)))
    for path in packages(folder):
        reader = Reader(path.name, path.name, figure_xml, article, read_figures)
        _, sound = path, list(map(as_text, read_figures(path)[0]))
        assert len(sound) == N
        for what, data in package_cases(path.read_bytes(), seed): out.append((path.name, what, *outcome(reader, Malformed(what, data), path, sound)))
    return out


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('malformed')
    return trial(folder) + others(folder)


def test_every_malformed_input_is_named_and_the_rest_is_kept(outcomes):
    counts = Counter(o for _, _, o, _ in outcomes)
    bad = [x for x in outcomes if x[2] not in GOOD]
    print(f'\n{len(outcomes)} malformed inputs of {len({x[0] for x in outcomes})} readers: ' + ', '.join(f'{n} {o}' for o, n in counts.most_common()))
    print(f'{counts["traceback"]} tracebacks, {counts["silent loss"] + counts["silent change"] + counts["rest lost"]} silent losses, {counts["not named"]} not named')
    for name, what, o, words in bad: print(f'{o}: {name}, {what}: {words[-600:]}')
    assert len(outcomes) >= AT_LEAST and not bad


def test_most_damage_is_refused_or_named_and_not_kept(outcomes):
    "A reader that kept everything as it is would pass the test above."
    counts = Counter(o for _, _, o, _ in outcomes)
    assert counts['refused'] + counts['left out and named'] + counts['named'] > len(outcomes) / 2 and counts['kept without a tag'] < len(outcomes) / 10


def test_what_a_reader_accepts_can_be_scored(tmp_path, capsys):
    "Answers with odd ids, prompts and texts end in a score that counts them, or in a sentence."
    readers = [r for r in READERS if r.name.startswith('answers')]
    (tmp_path/'test.json').write_bytes(as_json([item(i) for i in range(N)]))
    scored = 0
    for reader in readers:
        path = tmp_path/reader.file
        for case in cases(reader, seed=1):
            path.write_bytes(case.data)
            try: score_files(tmp_path/'test.json', path, 'strict', part=True)
            except ValueError as e: assert '\n' not in str(e), e
            else: scored += 1
    assert scored >= 4


@pytest.mark.parametrize('read, o', [(lambda path: ([r for r in json.loads(path.read_text()) if isinstance(r, dict) and r.get('question')], []), {'silent loss', 'traceback', 'not named', 'silent change'}),
                                     (lambda path: ([], []), {'silent loss', 'rest lost'})])
def test_the_trial_can_fail(tmp_path, read, o):
    "A careless reader: what it loses without a word, and what it does not catch, is seen."
    reader = Reader('careless', 'x.json', item, as_json, read)
    (tmp_path/'x.json').write_bytes(as_json([item(i) for i in range(N)]))
    sound = [as_text(item(i)) for i in range(N)]
    found = {outcome(reader, case, tmp_path/'x.json', sound)[0] for case in cases(reader)}
    assert found - GOOD and found - GOOD <= o | {'rest lost', 'silent loss'}, found
