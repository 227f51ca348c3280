// PyTorch enters a device before most operations, and a build for CPUs refuses to enter CUDA. Fake tensors only need it
// not to refuse.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
