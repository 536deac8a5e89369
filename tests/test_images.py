"Pictures of every kind a figure or a scan comes in, packages that strangers have packed, and what is refused."
import gzip
import io
import os
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageSequence
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from llava_med.data import articles, images
from llava_med.data.images import ImageError, Package, PackageError, image_bytes, image_size, open_image

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 255, (96, 80, 3), np.uint8))


def saved(img, fmt, **kw):
    f = io.BytesIO(); img.save(f, fmt, **kw); return f.getvalue()


def close(a, b, by=2): return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= by


# Formats

@pytest.mark.parametrize('fmt', ['PNG', 'GIF', 'TIFF', 'BMP', 'PPM', 'JPEG', 'WEBP', 'JPEG2000'])
def test_formats_are_the_same_picture(fmt):
    smooth = NOISE.resize((4, 4)).resize((80, 96), Image.BICUBIC)
    img = open_image(saved(smooth, fmt))
    assert (img.mode, img.size, img.info) == ('RGB', (80, 96), {}) and close(img, smooth, 40)
    assert image_size(saved(smooth, fmt)) == (80, 96)


def test_gif_first_frame_palette_and_transparency():
    red, blue = (Image.new('RGB', (9, 7), c) for c in ('red', 'blue'))
    data = saved(red, 'GIF', save_all=True, append_images=[blue])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0) and open_image(data, 1).getpixel((0, 0)) == (0, 0, 255)
    clear = Image.new('P', (4, 4), 1); clear.putpalette([0, 0, 0, 9, 9, 9])
    assert open_image(saved(clear, 'GIF', transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match='no frame 2'): open_image(data, 2)


def test_pages_of_a_tiff():
    pages = [Image.new('RGB', (8 + i, 8), (i * 50,) * 3) for i in range(3)]
    data = saved(pages[0], 'TIFF', save_all=True, append_images=pages[1:])
    assert [open_image(data, i).size[0] for i in (None, 0, 1, 2)] == [8, 8, 9, 10]
    for bad in (3, -1):
        with pytest.raises(ImageError, match=f'3 frames, so there is no frame {bad}'): open_image(data, bad)


def test_a_thumbnail_in_front_is_passed_over():
    thumb, full = io.BytesIO(), Image.new('L', (64, 48), 200)
    Image.new('L', (8, 6), 100).save(thumb, 'TIFF', save_all=True, append_images=[full], tiffinfo={254: 1})
    data = bytearray(thumb.getvalue())
    with Image.open(io.BytesIO(bytes(data))) as im: flags = [im.seek(i) or im.tag_v2.get(254) for i in range(2)]
    if flags[1]:  # the writer gave both pages the same mark; take it from the second one
        second = struct.unpack('<I', data[4:8])[0]
        n = struct.unpack('<H', data[second:second+2])[0]
        second = struct.unpack('<I', data[second+2+12*n:second+6+12*n])[0]
        at = data.index(struct.pack('<HH', 254, 4), second); data[at+8:at+12] = bytes(4)
    assert open_image(bytes(data)).size == image_size(bytes(data)) == (64, 48)
    assert open_image(bytes(data), 0).size == (8, 6)


@pytest.mark.parametrize('fmt', ['PNG', 'TIFF'])
def test_sixteen_bits(fmt):
    x = np.linspace(1000, 5000, 64*64).reshape(64, 64)
    y = np.asarray(open_image(saved(Image.fromarray(x.astype(np.uint16)), fmt)))[..., 0]
    assert (y.min(), y.max()) == (0, 255) and close(y, (x - 1000) / 4000 * 255, 1)


def test_other_number_types():
    x = np.linspace(-3, 3, 64*64, dtype=np.float32).reshape(64, 64)
    x[0, :3] = np.nan, np.inf, -np.inf
    y = np.asarray(open_image(saved(Image.fromarray(x), 'TIFF')))[..., 0]
    assert y[0, 1] == 255 and y[0, 2] == 0 and 100 < y[32, 0] < 150
    assert open_image(saved(Image.fromarray(np.full((8, 8), 7, np.int32)), 'TIFF')).mode == 'RGB'
    assert open_image(saved(Image.new('1', (8, 8), 1), 'PNG')).getpixel((0, 0)) == (255, 255, 255)


def test_colours_of_printing():
    cmyk = Image.new('CMYK', (16, 16), (0, 255, 255, 0))
    for fmt in ('JPEG', 'TIFF'):
        r, g, b = open_image(saved(cmyk, fmt)).getpixel((8, 8))
        assert r > 200 and g < 60 and b < 60, fmt
    lab = Image.new('LAB', (8, 8), (140, 80 - 128 + 128, 70))
    assert open_image(saved(lab, 'TIFF')).mode == 'RGB'
    assert open_image(saved(Image.new('YCbCr', (8, 8), (128, 128, 128)), 'JPEG')).getpixel((0, 0)) == (128, 128, 128)
    half = open_image(saved(Image.new('LA', (4, 4), (0, 128)), 'PNG')).getpixel((0, 0))[0]
    assert 120 < half < 135


@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_orientation(fmt, turn):
    "One corner is red; every orientation must bring it to where a viewer would."
    upright = Image.new('RGB', (48, 32), 'white'); upright.paste('red', (0, 0, 16, 16))
    undo = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}
    stored = upright.transpose(undo[turn]) if turn in undo else upright
    if fmt == 'TIFF': data = saved(stored, fmt, tiffinfo={274: turn})
    else:
        exif = stored.getexif(); exif[274] = turn
        data = saved(stored, fmt, exif=exif)
    img = open_image(data)
    assert img.size == image_size(data) == (48, 32)
    assert img.getpixel((4, 4))[1] < 60 and min(img.getpixel((40, 24))) > 200


def test_metadata_does_not_travel():
    exif = NOISE.getexif(); exif[270] = 'Jane Doe'
    img = open_image(saved(NOISE, 'JPEG', exif=exif, comment=b'Jane Doe'))
    assert img.info == {} and not img.getexif() and b'Jane' not in saved(img, 'JPEG') + saved(img, 'PNG')


# What is refused

@pytest.mark.parametrize('fmt', ['PNG', 'GIF', 'TIFF', 'BMP', 'PPM', 'JPEG', 'WEBP', 'progressive JPEG', 'compressed TIFF', 'JPEG2000'])
@pytest.mark.parametrize('share', [0, .01, .1, .5, .9, .97])
def test_cut_files_are_refused(fmt, share):
    kw = dict(progressive=True) if fmt.startswith('prog') else dict(compression='tiff_lzw') if fmt.startswith('comp') else {}
    data = saved(NOISE, fmt.split()[-1], **kw)
    with pytest.raises(ImageError, match='^image: not an image (that can be read|of a known)') as e: open_image(data[:int(len(data) * share)])
    assert '\n' not in str(e.value)


def png_claiming(w, h):
    data = bytearray(saved(Image.new('1', (8, 8)), 'PNG'))
    data[16:24] = struct.pack('>II', w, h)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    return bytes(data)


@pytest.mark.parametrize('side', [10_001, 15_000, 60_000, 2**31 - 1])
def test_bombs_are_refused_before_they_are_decoded(side):
    start = time.time()
    with pytest.raises(ImageError, match='refused|bomb|cannot|not an image'): open_image(png_claiming(side, side))
    assert time.time() - start < .5


def test_a_bomb_on_a_later_page_is_refused():
    data = saved(Image.new('1', (8, 8)), 'TIFF', save_all=True, append_images=[Image.new('1', (12_000, 12_000))], compression='group4')
    assert len(data) < 10_000 and open_image(data, 0).size == (8, 8)
    with pytest.raises(ImageError, match='refused'): open_image(data, 1)


@pytest.mark.parametrize('data', [b'', b'x', b'\x89PNG\r\n\x1a\n', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', b'<svg xmlns="http://www.w3.org/2000/svg"/>',
                                  b'%PDF-1.4', b'GIF89a', b'\0' * 128 + b'DICM', b'<html>Not found</html>', b'II*\0\x08\0\0\0\xff\xff'])
def test_what_is_no_picture(data):
    with pytest.raises(ImageError, match='^image: ') as e: open_image(data)
    assert '\n' not in str(e.value) and len(str(e.value)) < 250 and image_size(data) == (None, None)


def test_paths_that_lead_nowhere(tmp_path):
    for ref in (tmp_path/'none.png', tmp_path, f'{tmp_path}/none.zip::a.png', 'a::b', '', '::'):
        with pytest.raises(ImageError): open_image(ref)


# DICOM

def dicom(x, kind='MONOCHROME2', syntax=ExplicitVRLittleEndian, **tags):
    "A DICOM file of an array, with a patient."
    x = np.asarray(x)
    ds = Dataset()
    ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    colour = kind in ('RGB', 'YBR_FULL')
    frames = x.ndim == 3 + colour
    ds.Rows, ds.Columns = x.shape[frames:frames + 2]
    if frames: ds.NumberOfFrames = len(x)
    ds.SamplesPerPixel = 3 if colour else 1
    if colour: ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = x.dtype.itemsize * 8; ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(x.dtype.kind == 'i'); ds.PhotometricInterpretation = kind
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = 'Doe^Jane', 'SECRET7', '19700101'
    for k, v in tags.items(): setattr(ds, k, v)
    ds.PixelData = x.tobytes() + b'\0' * (x.nbytes % 2)
    f = io.BytesIO(); pydicom.dcmwrite(f, ds, enforce_file_format=True)
    return f.getvalue()


def grey(data, frame=None): return np.asarray(open_image(data, frame))[..., 0].astype(int)


RAMP = np.arange(0, 4096, dtype=np.int16).reshape(64, 64)


def test_dicom_rescale_and_window():
    data = dicom(RAMP, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    want = np.clip((RAMP - 1024 - (40 - .5)) / 399 + .5, 0, 1) * 255
    assert close(grey(data), want, 1)


def test_dicom_window_is_not_stretched_to_what_the_picture_holds():
    "All values lie in the lower half of the window, so nothing is brighter than half."
    data = dicom(RAMP // 4, WindowCenter=1024, WindowWidth=2048)
    assert 120 <= grey(data).max() <= 130


def test_dicom_kinds_of_window():
    exact = dicom(RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction='LINEAR_EXACT')
    assert close(grey(exact), np.clip((RAMP - 1500) / 1000, 0, 1) * 255, 1)
    sigmoid = dicom(RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction='SIGMOID')
    assert close(grey(sigmoid), 255 / (1 + np.exp(-4 * (RAMP - 2000.) / 1000)), 1)
    assert close(grey(dicom(RAMP, WindowCenter=[2000, 40], WindowWidth=[1000, 400])), grey(dicom(RAMP, WindowCenter=2000, WindowWidth=1000)), 0)


@pytest.mark.parametrize('tags', [dict(), dict(WindowCenter=9e5, WindowWidth=10), dict(WindowCenter=100, WindowWidth=0), dict(WindowCenter='', WindowWidth='')])
def test_dicom_without_a_window_that_helps(tags):
    y = grey(dicom(RAMP, **tags))
    assert (y.min(), y.max()) == (0, 255)


@pytest.mark.parametrize('key', ['VOILUTSequence', 'ModalityLUTSequence'])
@pytest.mark.parametrize('bits', [8, 16])
def test_dicom_tables_of_grey_values(key, bits):
    table = Dataset(); table.add_new('LUTDescriptor', 'US', [256, 0, bits])
    turned = (255 - np.arange(256)) * (257 if bits == 16 else 1)
    table.add_new('LUTData', 'OW', turned.astype('<u2').tobytes())
    if key[0] == 'M': table.ModalityLUTType = 'US'
    x = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert close(grey(dicom(x, **{key: [table]})), 255 - x, 1)


def test_dicom_monochrome1_is_turned():
    window = dict(WindowCenter=2048, WindowWidth=4096)
    assert close(grey(dicom(RAMP, 'MONOCHROME1', **window)), 255 - grey(dicom(RAMP, **window)), 0)


def test_dicom_padding_does_not_set_the_contrast():
    x = RAMP.copy(); x[:8] = -2000
    for kind in ('MONOCHROME2', 'MONOCHROME1'):
        y = grey(dicom(x, kind, PixelPaddingValue=-2000))
        assert y[:8].max() == 0 and (y[8:].min(), y[8:].max()) == (0, 255)


def test_dicom_frames():
    data = dicom(np.stack([np.full((8, 8), v, np.uint8) for v in (10, 20, 30, 40)]), WindowCenter=128, WindowWidth=256)
    assert [grey(data, f)[0, 0] for f in (None, 0, 3)] == [30, 10, 40] and image_size(data) == (8, 8)
    with pytest.raises(ImageError, match='4 frames, so there is no frame 4'): open_image(data, 4)
    lying = dicom(np.zeros((8, 8), np.uint8), NumberOfFrames=1000)
    with pytest.raises(ImageError, match='image: '): open_image(lying)


def test_dicom_values_per_frame():
    def groups(slope, c, w):
        g, t, v = Dataset(), Dataset(), Dataset()
        t.RescaleSlope, t.RescaleIntercept, t.RescaleType = slope, 0, 'US'
        v.WindowCenter, v.WindowWidth = c, w
        g.PixelValueTransformationSequence, g.FrameVOILUTSequence = [t], [v]
        return g
    data = dicom(np.stack([RAMP, RAMP]), PerFrameFunctionalGroupsSequence=[groups(1, 2048, 4096), groups(2, 2048, 4096)])
    assert close(grey(data, 0), RAMP / 4095 * 255, 1) and close(grey(data, 1), np.clip(RAMP / 2047.5, 0, 1) * 255, 1)


def test_dicom_colour():
    x = np.zeros((8, 8, 3), np.uint8); x[..., 0] = 200
    assert open_image(dicom(x, 'RGB')).getpixel((0, 0)) == (200, 0, 0)
    assert open_image(dicom(np.full((8, 8, 3), 100, np.uint16), 'RGB')).getpixel((0, 0)) == (0, 0, 0)
    two = dicom(np.stack([x, x * 0]), 'RGB')
    assert open_image(two, 0).getpixel((0, 0)) == (200, 0, 0) and open_image(two, 1).getpixel((0, 0)) == (0, 0, 0)


def test_dicom_bombs():
    with pytest.raises(ImageError, match='refused'): open_image(dicom(np.zeros((4, 4), np.uint8), Rows=60000, Columns=60000))
    assert open_image(dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian)).size == (64, 64)
    bomb = dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian)
    end = 144 + int.from_bytes(bomb[140:144], 'little')
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    filled = b''.join(z.compress(bytes(2**20)) for _ in range(300)) + z.flush()
    with pytest.raises(ImageError, match='refused'): open_image(bomb[:end] + filled)


@pytest.mark.parametrize('share', [.2, .5, .9, .99])
def test_cut_dicom_is_refused(share):
    data = dicom(RAMP)
    with pytest.raises(ImageError, match='^image: '): open_image(data[:int(len(data) * share)])


def test_no_patient_leaves_a_dicom(tmp_path):
    data = dicom(RAMP)
    assert b'SECRET7' in data
    img = open_image(data)
    assert img.info == {} and not any(b'SECRET7' in saved(img, f) or b'Doe' in saved(img, f) for f in ('PNG', 'JPEG', 'TIFF'))
    xml = ('<article xmlns:xlink="http://www.w3.org/1999/xlink"><body><fig id="F1"><caption><p>CT.</p></caption>'
           '<graphic xlink:href="scan.dcm"/></fig></body></article>').encode()
    package = tarred(tmp_path/'PMC1.tar.gz', {'a/a.nxml': xml, 'a/scan.dcm': data})
    r, = articles.read_article(package, images_dir=tmp_path/'out')
    kept = [p for p in (tmp_path/'out').rglob('*') if p.is_file()]
    assert [p.suffix for p in kept] == ['.png'] and r['image'] == str(kept[0]) and (r['width'], r['height']) == (64, 64)
    assert b'SECRET7' not in kept[0].read_bytes() and b'Doe' not in kept[0].read_bytes()


def test_dicom_compression_without_decoder():
    "pydicom brings a scan in JPEG-LS; its decoder is no requirement, and the message names it."
    from pydicom.data import get_testdata_file
    path = get_testdata_file('MR_small_jpeg_ls_lossless.dcm', download=False)
    try: assert open_image(path).size == (64, 64)
    except ImageError as e: assert 'JPEG-LS' in str(e) and 'install pylibjpeg' in str(e)


# Packages

XML = ('<article xmlns:xlink="http://www.w3.org/1999/xlink"><body><p>See Fig. 1.</p><fig id="F1"><label>Fig. 1</label><caption><p>A CT.</p></caption>'
       '<graphic xlink:href="g1"/></fig></body></article>').encode()
FILES = {'PMC9/a.nxml': XML, 'PMC9/g1.jpg': saved(NOISE, 'JPEG'), 'PMC9/g1.gif': b'thumb', 'PMC9/._g1.jpg': b'mac', '__MACOSX/PMC9/x': b''}


def tarred(path, files, mode='w:gz', **header):
    with tarfile.open(path, mode) as tar:
        for n, d in (files.items() if isinstance(files, dict) else files):
            info = tarfile.TarInfo(n); info.size = len(d)
            for k, v in header.items(): setattr(info, k, v)
            tar.addfile(info, io.BytesIO(d))
    return path


def zipped(path, files, **info):
    with zipfile.ZipFile(path, 'w') as z:
        for n, d in (files.items() if isinstance(files, dict) else files):
            m = zipfile.ZipInfo(n); m.compress_type = zipfile.ZIP_DEFLATED
            for k, v in info.items(): setattr(m, k, v)
            z.writestr(m, d)
    return path


@pytest.mark.parametrize('name, make', [('PMC9.tar.gz', tarred), ('PMC9.tgz', tarred), ('PMC9.tar', lambda p, f: tarred(p, f, 'w')), ('PMC9.zip', zipped), ('PMC9.TAR.GZ', tarred)])
def test_packages_are_read_alike(tmp_path, name, make):
    make(tmp_path/name, FILES)
    r, = articles.read_articles([tmp_path])
    assert (r['width'], r['height']) == (80, 96) and r['image'] == f'{tmp_path/name}::PMC9/g1.jpg' and r['id'] == 'PMC9_F1' and len(r['mentions']) == 1
    assert open_image(r['image']).size == (80, 96)
    kept, = articles.read_article(tmp_path/name, images_dir=tmp_path/'out')
    assert Path(kept['image']).read_bytes() == FILES['PMC9/g1.jpg']
    assert [str(p.relative_to(tmp_path/'out')) for p in (tmp_path/'out').rglob('*.*')] == ['PMC9/g1.jpg']


EVIL = ['../x.nxml', 'a/../../x.nxml', '/tmp/x.nxml', '//x.nxml', 'C:/x.nxml', 'C:\\x.nxml', '..\\x.nxml', '\\x.nxml', '..', 'a/..']


@pytest.mark.parametrize('make, name', [(tarred, 'x.tar.gz'), (zipped, 'x.zip')])
@pytest.mark.parametrize('evil', EVIL)
def test_names_that_lead_outside(tmp_path, make, name, evil):
    make(tmp_path/name, {'a/a.nxml': XML, 'a/g1.jpg': FILES['PMC9/g1.jpg'], evil: b'owned'})
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(articles.ArticleError, match=f'{name}: .* outside its folder'): articles.read_article(tmp_path/name, images_dir=tmp_path/'out')
    assert sorted(tmp_path.rglob('*')) == before
    problems = []
    assert list(articles.read_articles([tmp_path], lambda s, why: problems.append(why), tmp_path/'out')) == [] and len(problems) == 1


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices_in_tar(tmp_path, kind):
    path = tarred(tmp_path/'x.tar', {'a/a.nxml': b''}, 'w', type=kind, linkname='/etc/passwd')
    with pytest.raises(PackageError, match='link or device; refused'): Package(path)


@pytest.mark.parametrize('info, why', [(dict(external_attr=0o120777 << 16), 'link or device'), (dict(external_attr=0o010666 << 16), 'link or device')])
def test_links_and_devices_in_zip(tmp_path, info, why):
    with pytest.raises(PackageError, match=why): Package(zipped(tmp_path/'x.zip', {'a/a.nxml': b'/etc/passwd'}, **info))


def test_zip_behind_a_password(tmp_path):
    path = zipped(tmp_path/'x.zip', {'a.nxml': XML})
    data = bytearray(path.read_bytes())
    data[data.index(b'PK\1\2') + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match='password'): Package(path)


def test_graphics_cannot_name_files_elsewhere(tmp_path):
    (tmp_path/'secret.jpg').write_bytes(b'x'); (tmp_path/'a').mkdir()
    for href in ('../secret', '/etc/passwd', 'file:///etc/passwd', '..', '.', '../secret.jpg'):
        (tmp_path/'a/a.xml').write_bytes(XML.replace(b'"g1"', f'"{href}"'.encode()))
        r, = articles.read_article(tmp_path/'a/a.xml')
        assert r['image'] is None, href


@pytest.mark.parametrize('package', ['...tar.gz', '..tar.gz', 'a b.tar.gz', '..zip', '-x.zip'])
def test_written_names_stay_inside(tmp_path, package):
    (tmp_path/'in').mkdir()
    make = zipped if package.endswith('zip') else tarred
    path = make(tmp_path/'in'/package, {'a/a.nxml': XML, 'a/g1.jpg': b'1'})
    articles.read_article(path, images_dir=tmp_path/'out/deep')
    assert all((tmp_path/'out/deep') in p.parents for p in tmp_path.rglob('*.jpg')) and len(list(tmp_path.rglob('*.jpg'))) == 1


def test_two_images_of_one_name(tmp_path):
    xml = XML.replace(b'</body>', b'<fig id="F2"><caption><p>B.</p></caption><graphic xlink:href="g2"/></fig></body>')
    one, two = saved(NOISE, 'JPEG'), saved(NOISE.rotate(90), 'JPEG')
    tarred(tmp_path/'x.tar.gz', {'a.nxml': xml, 'u/g1.jpg': one, 'v/g1.jpg': two, 'v/g2.jpg': two})
    a, b = articles.read_article(tmp_path/'x.tar.gz', images_dir=tmp_path/'out')
    assert Path(a['image']).read_bytes() == one and Path(b['image']).read_bytes() == two and a['image'] != b['image']


def test_many_and_large_members(tmp_path, monkeypatch):
    many = [(f'{i}', b'') for i in range(images.MAX_MEMBERS + 1)]
    for path in (tarred(tmp_path/'x.tar.gz', many), zipped(tmp_path/'x.zip', many), tarred(tmp_path/'y.tar.gz', many, type=tarfile.DIRTYPE)):
        with pytest.raises(PackageError, match='5000 files; refused'): Package(path)
    monkeypatch.setattr(images, 'MAX_PACKAGE', 2**20)
    large = [(f'{i}', bytes(2**18)) for i in range(6)]
    for path in (tarred(tmp_path/'x.tar.gz', large), zipped(tmp_path/'x.zip', large)):
        with pytest.raises(PackageError, match='1048576 bytes'): Package(path)


def test_one_large_member_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'MAX_FILE', 2**17)
    for path in (tarred(tmp_path/'x.tar.gz', {'a.nxml': XML, 'g1.jpg': bytes(2**18)}), zipped(tmp_path/'x.zip', {'a.nxml': XML, 'g1.jpg': bytes(2**18)})):
        notes = []
        r, = articles.read_article(path, notes=notes)
        assert r['width'] is None and len(notes) == 1 and '262144 bytes' in notes[0]
        with pytest.raises(ImageError, match='262144 bytes'): open_image(r['image'])


def limited(code, *args, megabytes=700):
    "Run a piece of Python under a limit of memory; its output."
    def limit(): resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20,) * 2)
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], preexec_fn=limit, capture_output=True, text=True, timeout=60,
                          env={**os.environ, 'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'})
    return done.stdout + done.stderr


OPEN = 'import sys\nfrom llava_med.data.images import *\ntry: Package(sys.argv[1])\nexcept PackageError as e: print("refused:", e)'


def test_a_huge_header_takes_no_memory(tmp_path):
    "A pax header of a gigabyte is a few kilobytes when packed, and tarfile would read it whole."
    head = tarfile.TarInfo('x'); head.type = tarfile.XHDTYPE; head.size = 2**30
    with gzip.open(tmp_path/'x.tar.gz', 'wb', 1) as f:
        f.write(head.tobuf())
        for _ in range(64): f.write(bytes(2**20))
    assert 'refused:' in limited(OPEN, tmp_path/'x.tar.gz') and (tmp_path/'x.tar.gz').stat().st_size < 10**6


def test_a_member_that_unfolds_to_more_than_the_limit(tmp_path):
    with gzip.open(tmp_path/'x.tar.gz', 'wb', 1) as f:
        head = tarfile.TarInfo('a.nxml'); head.size = 4 * 2**30; f.write(head.tobuf()); f.write(bytes(2**20))
    start = time.time()
    with pytest.raises(PackageError, match='bytes or'): Package(tmp_path/'x.tar.gz')
    assert time.time() - start < 1


def test_a_zip_that_lies_about_its_sizes(tmp_path):
    path = zipped(tmp_path/'x.zip', {'a.nxml': XML, 'g1.jpg': bytes(2**20)})
    data = bytearray(path.read_bytes())
    at = data.rindex(b'PK\1\2'); data[at+24:at+28] = struct.pack('<I', 10)
    path.write_bytes(data)
    notes = []
    r, = articles.read_article(path, notes=notes)
    assert notes and r['width'] is None


@pytest.mark.parametrize('name, make', [('x.tar.gz', tarred), ('x.zip', zipped), ('x.tar', lambda p, f: tarred(p, f, 'w'))])
@pytest.mark.parametrize('share', [0, .1, .5, .9])
def test_cut_packages(tmp_path, name, make, share):
    data = make(tmp_path/name, FILES | {'PMC9/g2.jpg': RNG.bytes(100_000)}).read_bytes()
    (tmp_path/name).write_bytes(data[:int(len(data) * share)])
    notes = []
    try: assert articles.read_article(tmp_path/name, notes=notes)[0]['fig_id'] == 'F1'
    except articles.ArticleError as e: notes.append(str(e))
    assert notes and name in notes[0] and '\n' not in notes[0]


@pytest.mark.parametrize('seed', range(30))
def test_damaged_packages_end_in_a_sentence(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for name, make in (('x.tar.gz', tarred), ('x.zip', zipped), ('x.tar', lambda p, f: tarred(p, f, 'w'))):
        data = bytearray(make(tmp_path/name, FILES).read_bytes())
        for i in rng.integers(0, len(data), 8): data[i] = rng.integers(256)
        (tmp_path/name).write_bytes(data)
        try: articles.read_article(tmp_path/name, images_dir=tmp_path/'out')
        except articles.ArticleError as e: assert '\n' not in str(e)
    assert {p.name for p in tmp_path.iterdir()} <= {'x.tar.gz', 'x.zip', 'x.tar', 'out'}


def test_what_is_in_a_package(tmp_path):
    no_xml = zipped(tmp_path/'a.zip', {'readme.txt': b''})
    with pytest.raises(articles.ArticleError, match='no .nxml or .xml'): articles.read_article(no_xml)
    with pytest.raises(articles.ArticleError, match='not a JATS'): articles.read_article(zipped(tmp_path/'b.zip', {'a.xml': b'<html/>'}))
    (tmp_path/'c').mkdir()
    (tmp_path/'c/article.xml').write_bytes(XML); zipped(tmp_path/'c/data.zip', {'table.csv': b''})
    assert [p.name for p in articles.find_articles([tmp_path/'c'])] == ['article.xml']
    r, = articles.read_article(zipped(tmp_path/'d.zip', {'x/supplement.xml': b'<data/>', 'x/article.xml': XML, 'x/g1.png': saved(NOISE, 'PNG')}))
    assert r['image'].endswith('::x/g1.png')
    two = articles.read_article(tarred(tmp_path/'e.tar.gz', {'p/a.nxml': XML, 'p/g1.jpg': b'1', 'q/b.nxml': XML, 'q/g1.jpg': b'2'}))
    assert [r['image'].split('::')[1] for r in two] == ['p/g1.jpg', 'q/g1.jpg']


def test_the_command_among_hostile_sources(tmp_path, capsys):
    "One good package among bad ones: exit code 0, one row for every problem, and nothing outside the folders that were named."
    source = tmp_path/'in'; source.mkdir()
    tarred(source/'PMC9.tar.gz', FILES)
    for i, evil in enumerate(EVIL):
        tarred(source/f'evil{i}.tar.gz', {'a.nxml': XML, evil: b'owned'}); zipped(source/f'evil{i}.zip', {'a.nxml': XML, evil: b'owned'})
    tarred(source/'link.tar', {'a.nxml': b''}, 'w', type=tarfile.SYMTYPE, linkname='/etc/passwd')
    (source/'bomb.xml').write_text('<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><article>&y;</article>')
    (source/'cut.tgz').write_bytes((source/'PMC9.tar.gz').read_bytes()[:300]); (source/'no.zip').write_bytes(b'PK\3\4 no zip')
    before = {p for p in tmp_path.rglob('*')}
    assert articles.figures([source], tmp_path/'out.jsonl', tmp_path/'images') == 0
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*') if p.is_file() and p not in before}
    assert written == {'out.jsonl', 'out.jsonl.problems.jsonl', 'images/PMC9/g1.jpg'}
    n = 2 * len(EVIL) + 4
    assert len((tmp_path/'out.jsonl.problems.jsonl').read_text().splitlines()) == n and f'{n} problems' in capsys.readouterr().out
    assert articles.figures([source/'link.tar'], tmp_path/'none.jsonl') == 1 and not (tmp_path/'none.jsonl').exists()


def test_references_into_packages(tmp_path):
    folder = tmp_path/'odd::name'; folder.mkdir()
    (folder/'a.png').write_bytes(b'1')
    assert image_bytes(folder/'a.png') == b'1'
    tarred(folder/'x.tar.gz', {'u/a.png': b'2'}); zipped(folder/'x.zip', {'u/a.png': b'3'})
    assert image_bytes(f'{folder}/x.tar.gz::u/a.png') == b'2' and image_bytes(f'{folder}/x.zip::u/a.png') == b'3'


# What stands beside the pixels, and kinds that cannot be read

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


BESIDE = {'2 MB of text': chunk(b'tEXt', b'k\0' + b'x' * 2_000_000), '2 MB of XMP': chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + b'<' * 2_000_000), 'a broken note': chunk(b'eXIf', b'Exif\0\0 no note'),
          'a broken profile': chunk(b'iCCP', b'p\0\0 none'), 'a wrong sum': chunk(b'tEXt', b'k\0v')[:-4] + b'\0' * 4}


@pytest.mark.parametrize('what', BESIDE)
def test_metadata_never_costs_the_pixels(what):
    data = saved(NOISE, 'PNG')
    data = data[:33] + BESIDE[what] + data[33:]
    assert open_image(data).tobytes() == NOISE.tobytes() and image_size(data) == NOISE.size
    with pytest.raises(ImageError, match='^image: '): open_image(data[:-500])


def test_broken_notes_of_a_jpeg_are_left_out_and_sound_ones_count():
    exif = NOISE.getexif(); exif[274] = 6
    data = saved(NOISE, 'JPEG', exif=exif)
    noted = data[:2] + b'\xff\xe2' + struct.pack('>H', 12) + b'MPF\0 broken' [:10] + data[2:]
    assert open_image(noted).size == open_image(data).size == NOISE.size[::-1]
    assert images._bare_jpeg(noted) != noted and open_image(images._bare_jpeg(noted)).size == NOISE.size


@pytest.mark.parametrize('data, said', [
    (gzip.compress(struct.pack('<i', 348) + bytes(340) + b'n+1\0' + bytes(64), mtime=0), 'a NIfTI volume; save the slice'), (struct.pack('>i', 348) + bytes(340) + b'ni1\0', 'a NIfTI volume'),
    (struct.pack('<i', 540) + b'n+2\0\r\n\x1a\n' + bytes(540), 'a NIfTI volume'), (b'NRRD0004\n', 'an NRRD volume'), (b'\x93NUMPY\x01\0', 'a NumPy array'), (b'%PDF-1.4', 'a PDF; save the page'),
    (b'<!DOCTYPE html><html>', 'a web page'), (b'\0\0\0\x18ftypheic', 'a HEIC photograph'), (gzip.compress(b'x' * 900, mtime=0), 'compressed; unpack it'), (b'nothing', 'not an image of a known format.')])
def test_what_is_known_but_no_image_is_named_with_a_remedy(data, said):
    with pytest.raises(ImageError) as e: open_image(data)
    assert said in str(e.value) and '\n' not in str(e.value) and image_size(data) == (None, None)


def test_a_tiff_of_floats_in_three_channels_is_named():
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 32), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 200), (277, 3, 1, 3), (278, 4, 1, 8), (279, 4, 1, 768), (339, 3, 1, 3)]
    head = b'II*\0' + struct.pack('<IH', 8, len(tags)) + b''.join(struct.pack('<HHII', *t) for t in tags) + bytes(4)
    with pytest.raises(ImageError, match='a TIFF of 32-bit floating-point numbers in 3 channels; save it as 8 bit'): open_image(head + bytes(2000))


@pytest.mark.parametrize('kind', ['MONOCHROME2', 'MONOCHROME1'])
def test_one_hot_pixel_without_a_window_leaves_the_rest_visible(kind):
    x = (RAMP // 4).astype(np.int16)
    good = grey(dicom(x, kind))
    x[5, 7] = 32_767
    y = grey(dicom(x, kind))
    assert y.std() > 60 and np.abs(np.delete(y.ravel() - good.ravel(), 5 * 64 + 7)).max() <= 2
    x[5, 7] = -32_000
    assert grey(dicom(x, kind)).std() > 60


def test_a_bright_part_that_is_more_than_a_few_pixels_sets_the_contrast():
    x = np.zeros((64, 64), np.int16); x[:4, :4] = 4000; x[10:20] = 100
    assert (grey(dicom(x)).max(), grey(dicom(x))[12, 3]) == (255, 6)
    one = np.zeros((64, 64), np.int16); one[3, 3] = 9     # all but one are equal: there is no other contrast
    assert grey(dicom(one)).max() == 255


# Names

def test_a_name_is_the_same_with_composed_letters_and_either_slash(tmp_path):
    from unicodedata import normalize
    decomposed = normalize('NFD', 'Größe')
    (tmp_path/decomposed).mkdir(); (tmp_path/decomposed/'ü.png').write_bytes(b'x')
    assert decomposed != 'Größe'
    for name in ('Größe/ü.png', 'Größe\\ü.png', f'{decomposed}/{normalize("NFD", "ü")}.png'): assert images.find_file(tmp_path, name) == f'{decomposed}/ü.png'
    for name in ('größe/ü.png', 'Größe/u.png', '../x', '', 'a\0b'): assert images.find_file(tmp_path, name) is None
    (tmp_path/decomposed/normalize('NFD', 'ü.png')).write_bytes(b'y')   # now there are two, and a third writing may mean either
    assert images.find_file(tmp_path, f'{decomposed}/ü.png') == f'{decomposed}/ü.png' and images.find_file(tmp_path, 'Größe/ü.png') is None
