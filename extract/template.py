"""Template: from a scan and the user's own reference volume, to a rigid transform between them.

For those who need the frame of an atlas: any volume with a head (or a stripped brain) in HU, whose
own axes are the frame that is wanted. Both volumes are first brought into the head frame, which
leaves a few degrees; these are found by Mattes mutual information on grids of 6 and 3 mm
(SimpleITK). Rigid only: the size and shape of the head stay.

Axes: z, y, x of an image that grows to the right, the front and the top.
"""

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float64

from ctfm.extract.align import HeadFrame, find_head_frame, find_scanner_frame
from ctfm.extract.resample import reduce_volume, resample
from ctfm.extract.volume import Volume

WINDOW_HU = (-50.0, 150.0)
"""What mutual information sees: brain against fluid and bone."""

_GRID_MM = 3.0
_SIZE_PX = 80
_MAX_SLICES = 56


def register_to_template(volume: Volume, template: Volume) -> HeadFrame:
    """Find the rigid transform that lays a scan onto a template.

    The frame's axes are the template's (RAS), x = 0 and y = 0 the middle of its head's extent and
    z = 0 its highest point: of the brain, if the template is stripped.

    Args:
        volume: The scan.
        template: The reference; registered to itself it gives its scanner frame.

    Returns:
        The frame, with the quality numbers of the scan's own head frame but for its standard
        deviations, and the mean mutual information `mutual_information` (higher is better).

    Raises:
        ScanError: As `find_head_frame`, for either volume.
    """
    moving, fixed = find_head_frame(volume), find_head_frame(template)
    between, information = _register(
        _image(volume, moving.world_from_head), _image(template, fixed.world_from_head)
    )
    own = {name: value for name, value in moving.quality.items() if "_sd_" not in name}
    scan_from_template = moving.world_from_head @ between @ np.linalg.inv(fixed.world_from_head)
    return HeadFrame(
        world_from_head=scan_from_template @ find_scanner_frame(template).world_from_head,
        quality={**own, "mutual_information": information},
    )


def _image(volume: Volume, world_from_head: Float64[np.ndarray, "4 4"]) -> sitk.Image:
    hu, position_mm = resample(
        reduce_volume(volume, in_plane_mm=_GRID_MM, slice_mm=_GRID_MM),
        world_from_head,
        size_px=_SIZE_PX,
        in_plane_mm=_GRID_MM,
        slice_mm=_GRID_MM,
        max_slices=_MAX_SLICES,
    )
    clipped = np.clip(hu[::-1, ::-1, ::-1].astype(np.float32), *WINDOW_HU)
    image = sitk.GetImageFromArray(clipped)
    image.SetSpacing((_GRID_MM, _GRID_MM, _GRID_MM))
    side_mm = -(_SIZE_PX - 1) / 2 * _GRID_MM
    image.SetOrigin((side_mm, side_mm, float(position_mm[-1])))
    return image


def _register(moving: sitk.Image, fixed: sitk.Image) -> tuple[Float64[np.ndarray, "4 4"], float]:
    """Head frame of the fixed image to head frame of the moving one."""
    transform = sitk.Euler3DTransform()
    transform.SetCenter((0.0, 0.0, -70.0))
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # the same result on every machine
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.NONE)
    method.SetMetricFixedMask(fixed > WINDOW_HU[0] + 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0, minStep=0.01, numberOfIterations=60, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([2.0, 1.0])
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    between = np.eye(4)
    between[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    between[:3, 3] = origin
    return between, -float(method.GetMetricValue())
