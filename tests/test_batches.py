"Training samples with several images, and where they come from."
import numpy as np
import pytest
import torch
from llava_med.data.conversations import fault, read_records, to_messages, write_records
from llava_med.models.anatomy import vision_features
from llava_med.models.llava import tiny_model
from llava_med.train.batches import Collator, batch_loss, encode, record_samples, pack_shared_prefixes
from llava_med.train.loop import Stage, fit
from llava_med.train.packing import PackedCollator, pack_rows

said = lambda *texts: [{'from': ('human', 'gpt')[i % 2], 'value': t} for i, t in enumerate(texts)]


@pytest.fixture(scope='module')
def toy():
    "A model, its processor, pixels and features of three images."
    model, processor = tiny_model(image_size=24)
    px = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return model, processor, px, vision_features(model, px)


def from_file(path, records, processor):
    "Samples and image names of records that went through a file."
    write_records(path/'records.json', records)
    return record_samples(read_records(path/'records.json'), processor, 4)


def test_a_stage_mixes_and_weighs_the_sources_of_a_file(toy, tmp_path):
    model, processor, px, feats = toy
    records = [dict(id=f'r{i}', image='a.png', conversations=said('<image>\nwhich side?', 'left'), **({'source': s} if s else {}))
               for i, s in enumerate(['general']*4 + ['figures']*2 + [None])]
    samples, _ = from_file(tmp_path, records, processor)
    assert [s.get('source') for s in samples] == ['general']*4 + ['figures']*2 + [None]
    assert 'source' not in samples[-1]
    collate = Collator(processor.tokenizer.pad_token_id, feats)
    stage = dict(trainable=('projector',), lr=1e-3, batch_size=64)
    def seen(rows, **kw): return fit(model, rows, collate, Stage('toy', **stage, **kw))[-1]['samples']
    assert seen(samples) == 7
    assert seen(samples, mix={'general': .5, 'figures': 3}) == 2 + 6 + 1
    assert seen(pack_shared_prefixes(samples, model.config.image_token_id), mix={'figures': 2}) == 4   # one row a source
    with pytest.raises(ValueError, match="no sample comes from 'tables'"): seen(samples, mix={'tables': 2})
    a, b = (fit(tiny_model(image_size=24)[0], samples, collate, Stage('toy', **stage, **kw))[0]['loss'] for kw in ({}, dict(weights={'general': 0.})))
    assert a == pytest.approx(b, abs=1e-3)   # equal samples: the mean does not change
    other = [dict(s, labels=[l if l < 0 else 9 for l in s['labels']]) if s.get('source') == 'general' else s for s in samples]
    a, b = (fit(tiny_model(image_size=24)[0], x, collate, Stage('toy', **stage, weights={'general': 0.}))[0]['loss'] for x in (samples, other))
    assert a == pytest.approx(b, abs=1e-4)   # what weighs nothing has no influence


def test_several_images_of_a_record_stand_in_their_order(toy, tmp_path):
    model, processor, px, feats = toy
    ask = '<image>\n<image>\nhas it grown?'
    records = [dict(id='one', image='b.png', conversations=said('<image>\nwhich side?', 'left')),
               dict(id='two', image=['a.png', 'b.png'], conversations=said(ask, 'yes')),
               dict(id='back', image=['b.png', 'a.png'], conversations=said(ask, 'yes')),
               dict(id='later', image=['b.png', 'c.png'], conversations=said('<image>\nwhich side?', 'left', 'and here?\n<image>', 'right'))]
    samples, names = from_file(tmp_path, records, processor)
    assert names == ['b.png', 'a.png', 'c.png']
    assert [s['image'] for s in samples] == [0, [1, 0], [0, 1], [0, 2]]
    collate = Collator(processor.tokenizer.pad_token_id, feats)
    for s in samples[1:]:
        theirs = model(input_ids=torch.tensor([s['input_ids']]), labels=torch.tensor([s['labels']]), pixel_values=px[s['image']]).loss
        ours, n = batch_loss(model, collate([s]))
        assert abs(theirs - ours/n) < 1e-5
    assert abs(batch_loss(model, collate(samples[1:2]))[0] - batch_loss(model, collate(samples[2:3]))[0]) > 1e-5


def test_samples_of_the_same_images_share_them(toy, tmp_path):
    model, processor, px, feats = toy
    pair = lambda i, a: dict(id=f'{i}{a}', image=['a.png', 'b.png'], conversations=said(f'<image>\n<image>\nquestion {i}?', a))
    late = dict(id='late', image=['a.png', 'b.png'], conversations=said('<image>\nwhich side?', 'left', '<image>\nand here?', 'right'))
    samples, _ = from_file(tmp_path, [pair(0, 'yes'), pair(1, 'no'), late, dict(late, id='late2'), pair(2, 'no')], processor)
    rows = pack_shared_prefixes(samples, model.config.image_token_id)
    assert [max(r['segments']) for r in rows] == [3, 1, 1]   # an answer between the images is scored in each sample
    assert sum(len(r['input_ids']) for r in rows) < sum(len(s['input_ids']) for s in samples)
    pad = processor.tokenizer.pad_token_id
    total, n = batch_loss(model, Collator(pad, feats)(samples))
    shared, m = batch_loss(model, Collator(pad, feats)(rows))
    assert n == m and abs(total - shared) < 1e-3
    packed = pack_rows(rows, 10_000)
    assert [r['image'] for r in packed] == [[0, 1]*3]
    twin = tiny_model(image_size=24)[0]
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation({'text_config': 'segmented'})
    together, k = batch_loss(twin, PackedCollator(pad, feats)(packed))
    assert k == n and abs(total - together) < 1e-3


@pytest.mark.parametrize('image,texts,why', [
    (['a.png', 'b.png'], ('<image>\nwhy?', 'no'), 'names 2 images and has 1 marks'),
    (['a.png', 'b.png'], ('<image><image><image>\nwhy?', 'no'), 'names 2 images and has 3 marks'),
    (['a.png', 'b.png'], ('<image>\nwhy?', 'no <image>'), 'in an answer'),
    (['a.png', ''], ('<image><image>\nwhy?', 'no'), 'no file name'), ([], ('why?', 'no'), 'empty list'),
    (None, ('<image>\nwhy?', 'no'), "names no 'image'"), ('a.png', ('<image><image>\nwhy?', 'no'), 'once and never is right')])
def test_marks_and_images_of_a_file_must_agree(tmp_path, image, texts, why):
    assert why in fault(dict(id='x', image=image, conversations=said(*texts)))
    with pytest.raises(ValueError, match='record 1'): write_records(tmp_path/'x.json', [dict(id='x', image=image, conversations=said(*texts))])


@pytest.mark.parametrize('image,text,counts', [(['a.png', 'b.png'], '<image>\nwhy?', '1 <image> marks and it names 2'),
                                               ('a.png', 'why?', '0 <image> marks and it names 1'), (None, '<image>\nwhy?', '1 <image> marks and it names 0')])
def test_a_record_whose_marks_and_images_differ_is_named(toy, image, text, counts):
    "Also where records did not come from a file, and where a template drops an image."
    with pytest.raises(ValueError, match=f"Record 'x': its text has {counts}"):
        record_samples([dict(id='x', image=image, conversations=said(text, 'no'))], toy[1].tokenizer, 4)


def test_each_image_part_stands_where_its_mark_stood():
    kinds = lambda text: [c.get('text', c['type']) for c in to_messages(dict(conversations=said(text, 'no')))[0]['content']]
    assert kinds('<image>\nwhy?') == ['image', 'why?']
    assert kinds('why?\n<image>') == ['why?', 'image']
    assert kinds('<image>\n<image>\nwhy?\n') == ['image', 'image', 'why?']
    assert kinds('before:\n<image>\nafter:\n<image>') == ['before:\n', 'image', '\nafter:', 'image']
    assert kinds('why?') == ['why?']


def test_no_patient_is_in_training_and_validation(tmp_path):
    "Two images of one patient stay on one side of a split that the set itself does not make."
    from llava_med.train.stages import trainable_questions
    from PIL import Image
    items = []
    for i in range(40):
        Image.new('RGB', (4, 4)).save(tmp_path/f'{i}.png')
        items.append(dict(id=str(i), images=[f'{i}.png'], question='?', answer='a', split='train', patient=f'p{i//2}', tags={}))
    found = trainable_questions(items, tmp_path)
    assert len(found.val) == 4 and not {o['patient'] for o in found.train} & {o['patient'] for o in found.val}


def test_a_system_turn_is_trained_or_left_out_and_counted(toy, capsys):
    processor = tiny_model(image_size=24)[1]
    plain, own = dict(id='a', image='a.png', conversations=said('<image>\nwhich side?', 'left')), dict(system='Answer as a radiologist.')
    bare, = record_samples([plain], processor, 4)[0]
    with_system, = record_samples([plain | own], processor, 4)[0]
    text = processor.tokenizer.decode(with_system['input_ids'])
    assert 'radiologist' in text and text.index('radiologist') < text.index('which side') and len(with_system['input_ids']) > len(bare['input_ids'])
    count = lambda s: sum(l >= 0 for l in s['labels'])
    assert count(with_system) == count(bare) and not capsys.readouterr().out
    given = processor.tokenizer.chat_template or processor.chat_template
    for template in (given.replace('for m in messages', "for m in messages if m['role'] != 'system'"),
                     "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + given):
        processor.tokenizer.chat_template = processor.chat_template = template
        found, _ = record_samples([plain, plain | own, plain | own], processor, 4)
        assert all(s['input_ids'] == bare['input_ids'] for s in found)
        assert 'The system turn of 2 of 3 conversations was left out' in capsys.readouterr().out


def test_questions_without_a_training_split_say_what_is_missing(tmp_path):
    from llava_med.train.stages import trainable_questions
    from PIL import Image
    Image.new('RGB', (4, 4)).save(tmp_path/'a.png')
    items = [dict(id=str(i), images=['a.png'], question='?', answer='a', split='all', tags={}) for i in range(3)]
    with pytest.raises(ValueError, match='3 questions belong to no training split; say in a column split'): trainable_questions(items, tmp_path)
    items[0]['images'] = ['gone.png']
    with pytest.raises(ValueError, match=r'none of 3 questions can be trained on \(1 [^)]+, 2 another split\)'): trainable_questions(items, tmp_path)
