"""DICOM files of one frame are read as a viewer shows them."""

import numpy as np
import pytest

from knowsam.errors import DataError
from knowsam.inference.files import Rules, find_inputs

RNG = np.random.default_rng(0)
pydicom = pytest.importorskip("pydicom")


def dicom(path, array, *, photometric="MONOCHROME2", bits=None, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.PatientName = "DOE^JANE"
    data.Rows, data.Columns = array.shape[:2]
    data.SamplesPerPixel = 3 if array.ndim == 3 else 1
    if array.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = 8 * array.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    data.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom_kinds(tmp_path):
    grey = RNG.integers(0, 256, (5, 7), np.uint8)
    path = tmp_path / "d.dcm"
    assert (only(dicom(path, grey)).read() == grey[..., None]).all()
    assert (only(dicom(path, grey, photometric="MONOCHROME1")).read() == 255 - grey[..., None]).all()
    colour = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    assert (only(dicom(path, colour, photometric="RGB")).read() == colour).all()
    twelve = RNG.integers(0, 4096, (5, 7)).astype(np.uint16)
    got = only(dicom(path, twelve, bits=12)).read()[..., 0]
    assert (got == np.rint(twelve / 4095 * 255)).all()


def test_a_dicom_window_is_looked_through(tmp_path):
    ct = np.array([[0, 24, 1024, 1064, 1104, 4000]], np.int16)
    tags = {"RescaleIntercept": "-1024", "RescaleSlope": "1", "WindowCenter": ["40", "500"], "WindowWidth": ["80", "9"]}
    path = dicom(tmp_path / "d.dcm", ct, **tags)
    got = only(path).read()[0, :, 0]
    assert got.tolist() == [0, 0, 0, 129, 255, 255]  # (40 - 39.5) / 79 + 0.5 of 255
    assert only(path, intensity="minmax").read()[0, :, 0].tolist() == np.rint(ct[0] / 4000 * 255).tolist()


def test_what_dicom_is_refused(tmp_path):
    ct = RNG.integers(-1000, 3000, (5, 7)).astype(np.int16)
    with pytest.raises(DataError, match="signed numbers"):
        only(dicom(tmp_path / "a.dcm", ct)).read()
    with pytest.raises(DataError, match="holds 2 frames"):
        only(dicom(tmp_path / "b.dcm", ct, NumberOfFrames=2)).read()
    content = (tmp_path / "a.dcm").read_bytes()
    for cut in (0, 50, 200, len(content) - 10):
        (tmp_path / "cut.dcm").write_bytes(content[:cut])
        with pytest.raises(DataError, match="not a DICOM image"):
            only(tmp_path / "cut.dcm", intensity="minmax").read()
    (tmp_path / "x.dcm").write_bytes(b"no dicom at all")
    with pytest.raises(DataError, match="not a DICOM image"):
        only(tmp_path / "x.dcm").read()


def only(path, **rules):
    [file] = find_inputs(path, Rules(**rules))
    return file
