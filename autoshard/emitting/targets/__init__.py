"""The devices that a program is compiled for, and their mesh."""

from autoshard.emitting.targets.device_mesh import TargetError as TargetError
from autoshard.emitting.targets.device_mesh import mesh_of as mesh_of
from autoshard.emitting.targets.devices import COMPILERS as COMPILERS
from autoshard.emitting.targets.devices import Target as Target
from autoshard.emitting.targets.devices import describe_target as describe_target
from autoshard.emitting.targets.devices import devices_of as devices_of
from autoshard.emitting.targets.devices import gpu_devices as gpu_devices
from autoshard.emitting.targets.devices import has_cuda as has_cuda
from autoshard.emitting.targets.devices import host_devices as host_devices
from autoshard.emitting.targets.devices import quiet_without_tpu as quiet_without_tpu
from autoshard.emitting.targets.devices import tpu_devices as tpu_devices
