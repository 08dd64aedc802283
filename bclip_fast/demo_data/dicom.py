"""Convert a DICOM file to 8-bit RGB images in display orientation, with the facts in its header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .captions import Facts

# Our labels for BodyPartExamined, or, if it is missing, for value 3 of the US ImageType (C.8.5.6.1.1).
_BODY_PARTS = {
    "HEAD": "head",
    "CHEST": "chest",
    "ABDOMEN": "abdomen",
    "PANCREAS": "abdomen",
    "WHOLE BODY": "whole body",
    "EPICARDIAL": "heart",
    "TEE": "heart",
    "ABDOM/RAD": "abdomen",
}
_VIEWS = {"PA": "posteroanterior (PA) view", "AP": "anteroposterior (AP) view"}
_APPLICATIONS = {
    "SMALL PARTS": "small parts examination",
    "EPICARDIAL": "echocardiogram",
    "TEE": "transesophageal echocardiogram",
    "ABDOM/RAD": "abdominal examination",
}
# A plane with a larger tilt from the body's axes counts as oblique.
_OBLIQUE_DEGREES = 25.0
# (centre, width) of the default windows of a CT, in HU.
_SOFT_TISSUE = (40.0, 400.0)
_BONE = (500.0, 2000.0)


def _text(header: Any, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None else str(value).strip()


def _number(header: Any, keyword: str) -> float | None:
    value = header.get(keyword)
    return float(value) if value not in (None, "") else None


def _image_type(header: Any) -> str:
    values = header.get("ImageType", [])
    return str(values[2]).strip() if len(values) > 2 else ""


def _body_part(header: Any) -> str | None:
    examined = _text(header, "BodyPartExamined").upper()
    if examined in _BODY_PARTS:
        return _BODY_PARTS[examined]
    if "LOWER LEG" in _text(header, "AcquisitionDeviceProcessingDescription").upper():
        return "lower leg"
    if _text(header, "StudyDescription").upper() == "SHOULDER":
        return "shoulder"
    # OM: positions are relative to the orbitomeatal line of the head.
    if _text(header, "PositionReferenceIndicator") == "OM":
        return "head"
    return _BODY_PARTS.get(_image_type(header).upper())


def orientation(header: Any) -> tuple[str | None, float, bool, bool]:
    """Return (plane, or None if it is oblique or unknown, tilt in degrees, flip rows, flip columns).

    The flips give the usual display: anterior or superior is up, and the patient's right (in sagittal planes: anterior)
    is on the left. The source is ImageOrientationPatient (C.7.6.2.1.1, LPS axes), or PatientOrientation (C.7.6.1.1.1)
    for projections.
    """
    cosines = header.get("ImageOrientationPatient")
    if cosines is None:
        letters = header.get("PatientOrientation") or ("", "")
        return None, 0.0, str(letters[1]).startswith("H"), str(letters[0]).startswith("R")
    row = np.array([float(value) for value in cosines[:3]])
    column = np.array([float(value) for value in cosines[3:]])
    normal = np.cross(row, column)
    axis = int(np.argmax(np.abs(normal)))
    tilt = float(np.degrees(np.arccos(min(1.0, abs(normal[axis])))))
    along_row, along_column = int(np.argmax(np.abs(row))), int(np.argmax(np.abs(column)))
    flip_columns = bool(row[along_row] < 0)
    flip_rows = bool(column[along_column] > 0) if along_column == 2 else bool(column[along_column] < 0)
    plane = ("sagittal", "coronal", "axial")[axis] if tilt <= _OBLIQUE_DEGREES else None
    return plane, tilt, flip_rows, flip_columns


def _details(header: Any, tilt: float, plane: str | None) -> list[str]:
    modality = _text(header, "Modality")
    details = []
    if (thickness := _number(header, "SliceThickness")) is not None:
        details.append(f"slice thickness {thickness:g} mm")
    if modality == "CT" and (voltage := _number(header, "KVP")) is not None:
        details.append(f"{voltage:g} kVp")
    if modality == "CT" and _text(header, "BodyPartExamined").upper() == "PANCREAS":
        details.append("pancreas study")
    if (field := _number(header, "MagneticFieldStrength")) is not None:
        details.append(f"{field:.1f} tesla")
    sequences = {"SE": "spin echo", "GR": "gradient echo", "IR": "inversion recovery"}
    if (sequence := sequences.get(_text(header, "ScanningSequence"))) is not None:
        details.append(sequence)
    if modality == "MR" and (echo := _number(header, "EchoTime")) is not None:
        details.append(f"echo time {echo:.0f} ms")
    if _text(header, "ContrastBolusAgent"):
        details.append("with contrast agent")
    if (view := _VIEWS.get(_text(header, "ViewPosition"))) is not None:
        details.append(view)
    if _text(header, "Laterality") == "R" and modality == "CR":
        details.append("right side")
    if modality == "US" and (use := _APPLICATIONS.get(_image_type(header).upper())) is not None:
        details.append(use)
    if modality == "NM" and _text(header, "StudyDescription"):
        details.append(f"{_text(header, 'StudyDescription').lower()} scan")
    if tilt > _OBLIQUE_DEGREES:
        details.append("oblique plane")
    elif plane is not None and tilt > 5:
        details.append(f"tilted by {tilt:.0f} degrees")
    return details


def header_facts(header: Any, extra_detail: str = "") -> Facts:
    """Return the facts in a DICOM header."""
    plane, tilt, _, _ = orientation(header)
    if plane is None and _image_type(header).upper() == "AXIAL":
        plane = "axial"
    protocol = _text(header, "ProtocolName").upper()
    details = _details(header, tilt, plane)
    if extra_detail:
        details.insert(0, extra_detail)
    return Facts(
        modality=_text(header, "Modality"),
        body_part=_body_part(header),
        plane=plane,
        sequence="T1" if protocol.startswith(("T1_", "T1W")) else None,
        details=tuple(details),
    )


def _windows(header: Any) -> list[tuple[str, tuple[float, float] | None]]:
    """Return (description, (centre, width)) of each window. None: use percentiles. A CT also gets a bone window."""
    centre, width = header.get("WindowCenter"), header.get("WindowWidth")
    window: tuple[float, float] | None = None
    if centre is not None and width is not None:
        # If there are several windows, use the first.
        first = [value[0] if hasattr(value, "__len__") else value for value in (centre, width)]
        window = (float(first[0]), float(first[1]))
    if _text(header, "Modality") != "CT":
        return [("", window)]
    window = window or _SOFT_TISSUE
    return [(f"window {window[0]:g}/{window[1]:g} HU", window), ("bone window", _BONE)]


def _to_8_bit(values: np.ndarray, window: tuple[float, float] | None, *, fixed: bool) -> np.ndarray:
    """Apply the linear ramp of a window. Unless `fixed`, limit it to the range of the values.

    Windows of radiographs often cover the full range of the detector.
    """
    low, high = np.percentile(values, [0.5, 99.5])
    if window is not None:
        # C.11.2.1.2.1: the linear ramp from c - 0.5 - (w-1)/2 to c - 0.5 + (w-1)/2.
        start = window[0] - 0.5 - (window[1] - 1) / 2
        low, high = (start, start + window[1] - 1) if fixed else (max(low, start), min(high, start + window[1] - 1))
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).round().astype(np.uint8)


def read(path: Path, frames: tuple[int, ...] = (0,)) -> list[tuple[np.ndarray, Facts]]:
    """Return an image (H, W, 3) uint8 with its facts for each frame and, for CT, each window.

    The function converts YBR to RGB, applies palette, rescale and window, and inverts MONOCHROME1. If a decoder is
    missing or the file is broken, pydicom's exception passes through.
    """
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    header = pydicom.dcmread(path)
    _, _, flip_rows, flip_columns = orientation(header)
    interpretation = header.PhotometricInterpretation
    images = []
    for frame in frames:
        pixels = pixel_array(header, index=frame)
        views: list[tuple[str, np.ndarray]] = []
        if interpretation == "PALETTE COLOR":
            colours = apply_color_lut(pixels, header)
            views.append(("", (colours >> 8 if colours.dtype == np.uint16 else colours)))
        elif pixels.ndim == 3:
            views.append(("", pixels))
        else:
            values = np.asarray(apply_modality_lut(pixels, header), dtype=np.float32)
            for description, window in _windows(header):
                grey = _to_8_bit(values, window, fixed=header.Modality == "CT")
                grey = 255 - grey if interpretation == "MONOCHROME1" else grey
                views.append((description, np.repeat(grey[:, :, None], 3, axis=2)))
        for description, image in views:
            image = image[::-1] if flip_rows else image
            image = image[:, ::-1] if flip_columns else image
            facts = header_facts(header, description)
            images.append((np.ascontiguousarray(image, dtype=np.uint8), facts))
    return images
