from pathlib import Path

import numpy as np
import pytest

from napari_innergs.geometry.frames import LPS_ZYX, RAS_ZYX
from napari_innergs.io.read import count_times, read_stack, read_times

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402

CT = "1.2.840.10008.5.1.4.1.1.2"
ALONG_COLUMNS = np.array([0.8, 0.6, 0.0])  # direction in which the column index grows, LPS x, y, z
ALONG_ROWS = np.array([0.0, 0.0, -1.0])
NORMAL = np.cross(ALONG_COLUMNS, ALONG_ROWS)
SERIES = "1.2.3.4"


def image_file(path, pixels, position, **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CT
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.SeriesNumber, data.SeriesDescription = SERIES, 1, "axial"
    data.Rows, data.Columns = (
        pixels.shape[-2:] if pixels.ndim == 2 or pixels.shape[-1] != 3 else pixels.shape[:2]
    )
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelSpacing = [0.75, 0.5]  # between rows, between columns
    data.ImageOrientationPatient = [*ALONG_COLUMNS, *ALONG_ROWS]
    if position is not None:
        data.ImagePositionPatient = [float(v) for v in position]
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def volume(count=5):
    return (np.arange(count * 6 * 7) % 251).reshape(count, 6, 7).astype(np.int16)


def series(folder, pixels, positions, order=None, **tags):
    folder.mkdir(exist_ok=True)
    # names say nothing about the place
    for name, i in enumerate(
        order if order is not None else np.random.default_rng(0).permutation(len(pixels))
    ):
        image_file(folder / f"im{name:03d}", pixels[i], positions[i], InstanceNumber=int(i) + 1, **tags)
    return folder


def along_normal(steps, start=(10.0, -20.0, 30.0)):
    return np.array(start) + np.asarray(steps, float)[:, None] * NORMAL


def world_of(stack, i, row, col):
    return (stack.frame_affine @ [stack.positions[i], row, col, 1])[:3]


def test_a_series_lies_where_the_standard_says(tmp_path):
    pixels, places = volume(), along_normal([0, 3, 6, 9, 12])
    stack = read_stack(series(tmp_path / "a", pixels, places))
    assert stack.dtype == np.int16 and stack.units == ("mm",) * 3 and stack.spacing == pytest.approx(3)
    np.testing.assert_array_equal(stack.data[..., 0], pixels)
    for i, row, col in ((0, 0, 0), (4, 5, 1), (2, 1, 6)):
        # DICOM PS3.3 C.7.6.2.1.1: position + column direction * column + row direction * row
        x, y, z = places[i] + ALONG_COLUMNS * 0.5 * col + ALONG_ROWS * 0.75 * row
        np.testing.assert_allclose(world_of(stack, i, row, col), [z, y, x], atol=1e-9)
    ras = read_stack(tmp_path / "a", world=RAS_ZYX)
    np.testing.assert_allclose(world_of(ras, 4, 5, 1), world_of(stack, 4, 5, 1) * [1, -1, -1])


def test_one_file_of_a_series_is_one_slice(tmp_path):
    folder = series(tmp_path / "a", volume(), along_normal(range(5)))
    with pytest.raises(ValueError, match="1 image, need at least 2"):
        read_stack(next(folder.iterdir()))


def test_same_world_as_nifti(tmp_path):
    nib = pytest.importorskip("nibabel")
    pixels, places = volume(), along_normal([0, 3, 6, 9, 12])
    dicom = read_stack(series(tmp_path / "a", pixels, places))
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = ALONG_COLUMNS * 0.5, ALONG_ROWS * 0.75
    lps[:3, 2], lps[:3, 3] = NORMAL * 3, places[0]
    ras = np.diag([-1, -1, 1, 1]) @ lps
    nib.save(nib.Nifti1Image(pixels.transpose(2, 1, 0), ras), tmp_path / "a.nii")
    nifti = read_stack(tmp_path / "a.nii", world=LPS_ZYX)
    np.testing.assert_array_equal(nifti.data, dicom.data)
    np.testing.assert_allclose(nifti.affine, dicom.affine, atol=1e-5)


def test_missing_slices_give_irregular_positions(tmp_path):
    stack = read_stack(series(tmp_path / "a", volume(4), along_normal([0, 2, 6, 8])))
    np.testing.assert_allclose(stack.positions, [0, 2, 6, 8])
    assert not stack.geometry.regular and stack.spacing == pytest.approx(2)


def test_gantry_tilt_keeps_its_direction(tmp_path):
    shift = np.array([0.0, 0.0, 1.0])
    places = along_normal([0, 3, 6, 9, 12]) + np.arange(5)[:, None] * shift
    stack = read_stack(series(tmp_path / "a", volume(), places))
    assert stack.spacing == pytest.approx(3)
    assert stack.geometry.cosine == pytest.approx(3 / np.sqrt(10))
    for i in range(5):
        np.testing.assert_allclose(world_of(stack, i, 0, 0), places[i][::-1], atol=1e-9)


def test_slices_off_the_line_are_refused(tmp_path):
    places = along_normal([0, 3, 6, 9, 12])
    places[2] += ALONG_COLUMNS * 2
    with pytest.raises(ValueError, match="mm off the line"):
        read_stack(series(tmp_path / "a", volume(), places))


def test_rescale(tmp_path):
    places = along_normal(range(5))
    hounsfield = read_stack(series(tmp_path / "a", volume(), places, RescaleSlope=1, RescaleIntercept=-1024))
    assert hounsfield.dtype == np.int16
    np.testing.assert_array_equal(hounsfield.data[..., 0], volume() - 1024)
    wide = read_stack(
        series(
            tmp_path / "b", volume().astype(np.uint16) + 65000, places, RescaleSlope=1, RescaleIntercept=-24
        )
    )
    np.testing.assert_array_equal(wide.data[..., 0], volume().astype(int) + 65000 - 24)
    scaled = read_stack(series(tmp_path / "c", volume(), places, RescaleSlope=0.25, RescaleIntercept=1.5))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.data[..., 0], volume() * 0.25 + 1.5)


def test_slopes_may_differ_between_slices(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for i, place in enumerate(along_normal(range(3))):
        image_file(folder / f"{i}", volume()[i], place, RescaleSlope=i + 1.0, RescaleIntercept=0)
    stack = read_stack(folder)
    np.testing.assert_allclose(stack.data[..., 0], volume(3) * np.array([1, 2, 3])[:, None, None])


def test_mixed_series_are_named_and_one_can_be_chosen(tmp_path):
    folder = series(tmp_path / "a", volume(), along_normal(range(5)))
    for i, place in enumerate(along_normal([0, 4, 8])):
        image_file(
            folder / f"other{i}", volume()[i], place,
            SeriesInstanceUID="1.2.3.5", SeriesNumber=7, SeriesDescription="scout",
        )  # fmt: skip
    (folder / "readme.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"2 series.*'axial'.*'scout'"):
        read_stack(folder)
    assert read_stack(folder, series="7").spacing == pytest.approx(4)
    assert read_stack(folder, series=SERIES).n_slices == 5
    with pytest.raises(ValueError, match="no single series '9'"):
        read_stack(folder, series="9")


@pytest.mark.parametrize(
    ("tags", "pixels", "word"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, None, "direction"),
        ({"PixelSpacing": [1, 1]}, None, "pixel spacing"),
        ({}, np.zeros((6, 8), np.int16), "size"),
        ({"PixelSpacing": [0, 0.5]}, None, "need positive"),
        ({"ImagePositionPatient": None}, None, "lacks what places"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, None, "palette"),
    ],
)
def test_images_that_do_not_belong(tmp_path, tags, pixels, word):
    folder = series(tmp_path / "a", volume(), along_normal(range(5)))
    image_file(folder / "z", volume()[0] if pixels is None else pixels, along_normal([7])[0], **tags)
    with pytest.raises(ValueError, match=word):
        read_stack(folder)


def test_no_position(tmp_path):
    (tmp_path / "a").mkdir()
    image_file(tmp_path / "a" / "x", volume()[0], None)
    with pytest.raises(ValueError, match="ImagePositionPatient"):
        read_stack(tmp_path / "a")


def test_repeated_positions_are_time_points_or_refused(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    places = along_normal([0, 2, 4])
    for time in (1, 0):
        for i in (2, 0, 1):
            image_file(
                folder / f"{time}{i}",
                volume()[i] + 100 * time,
                places[i],
                TemporalPositionIdentifier=time + 1,
            )
    assert count_times(folder) == 2
    for time, stack in enumerate(read_times(folder)):
        np.testing.assert_array_equal(stack.data[..., 0], volume(3) + 100 * time)
    image_file(folder / "extra", volume()[0], places[1])
    with pytest.raises(ValueError, match="lie at one position"):
        read_stack(folder)


def test_multi_frame_files(tmp_path):
    pixels, places = volume(4), along_normal([0, 2, 4, 8])
    order = [2, 0, 3, 1]
    frames = []
    for i in order:
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [float(v) for v in places[i]]
        content.TemporalPositionIndex = 1
        frame.PlanePositionSequence, frame.FrameContentSequence = Sequence([position]), Sequence([content])
        frames.append(frame)
    shared, orientation, measures, values = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [*ALONG_COLUMNS, *ALONG_ROWS]
    measures.PixelSpacing = [0.75, 0.5]
    values.RescaleSlope, values.RescaleIntercept = 1, -50
    shared.PlaneOrientationSequence = Sequence([orientation])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([values])
    path = image_file(
        tmp_path / "a.dcm", pixels[order], None, NumberOfFrames=4,
        PerFrameFunctionalGroupsSequence=Sequence(frames), SharedFunctionalGroupsSequence=Sequence([shared]),
    )  # fmt: skip
    stack = read_stack(path)
    np.testing.assert_array_equal(stack.data[..., 0], pixels - 50)
    np.testing.assert_allclose(stack.positions, [0, 2, 4, 8])
    np.testing.assert_allclose(world_of(stack, 3, 0, 0), places[3][::-1])


def test_colour(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (3, 6, 7, 3)).astype(np.uint8)
    folder = tmp_path / "a"
    folder.mkdir()
    for i, place in enumerate(along_normal(range(3))):
        image_file(
            folder / str(i), rgb[i], place,
            SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
        )  # fmt: skip
    np.testing.assert_array_equal(read_stack(folder).data, rgb)


def test_truncated_files(tmp_path):
    folder = series(tmp_path / "a", volume(), along_normal(range(5)))
    victim: Path = sorted(folder.iterdir())[2]
    content = victim.read_bytes()
    for length in (len(content) - 9, len(content) // 2, 200, 140):
        victim.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"{victim.name}|{folder.name}"):
            read_stack(folder)
