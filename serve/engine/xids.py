"""NVIDIA's Xid errors: their meanings, and whether an engine goes on working on the GPU that reported one.

Source: NVIDIA, "Analyzing Xid Errors with the Xid Catalog" (docs.nvidia.com/deploy/xid-errors, drivers up to R575), of
which `action` is the column "Resolution Bucket (Immediate Action)". Rows that the catalog calls unused, or that belong
to units no engine uses (display, video, copies of one error for each unit), are left out: like any that is not here,
they are told and drain nothing. Damage shows in ECC counters, NVML's recovery action or CUDA's own errors as well.
"""

from __future__ import annotations

from dataclasses import dataclass

# NVIDIA's buckets in which the GPU itself has to be seen to before anything works on it
SEEN_TO = ("RESET_GPU", "RESTART_BM", "RESTART_VM", "WORKFLOW_XID_48", "WORKFLOW_NVLINK_ERR")


@dataclass(frozen=True)
class Xid:
    """One Xid error. why: the reason where `drains` differs from NVIDIA's bucket."""

    what: str
    action: str
    why: str = ""

    @property
    def drains(self) -> bool:
        """True if the hardware is at fault: the engine gives its jobs back and is replaced."""
        return self.action in SEEN_TO or bool(self.why)


XIDS = {
    # the application's: it ends with an error of CUDA's if it was this one, and the GPU is healthy
    8: Xid("GPU stopped processing", "RESTART_APP"),
    11: Xid("invalid or corrupted push buffer stream", "RESTART_APP"),
    13: Xid("graphics engine exception", "RESTART_APP"),
    25: Xid("invalid or illegal push buffer stream", "RESTART_APP"),
    31: Xid("GPU memory page fault", "RESTART_APP"),
    32: Xid("invalid or corrupted push buffer stream", "RESTART_APP"),
    39: Xid("copy engine exception", "RESTART_APP"),
    40: Xid("copy engine exception", "RESTART_APP"),
    41: Xid("copy engine exception", "RESTART_APP"),
    43: Xid("GPU stopped processing", "IGNORE"),
    44: Xid("graphics engine fault during context switch", "IGNORE"),
    45: Xid("preemptive cleanup, due to previous errors", "WORKFLOW_XID_45"),
    68: Xid("video processor exception", "RESTART_APP"),
    69: Xid("graphics engine class error", "RESTART_APP"),
    80: Xid("corrupted data sent to GPU", "RESTART_APP"),
    137: Xid("NVLink privilege error", "IGNORE"),
    141: Xid("CUDA fast path error", "IGNORE"),
    # the hardware's, or of a driver that has lost hold of it
    46: Xid("GPU stopped processing", "RESET_GPU"),
    48: Xid("double bit ECC error", "WORKFLOW_XID_48"),
    62: Xid("internal micro-controller halt", "RESET_GPU"),
    63: Xid("GPU memory remapping event", "IGNORE", why="the row is replaced by the next reset of the GPU alone"),
    64: Xid("GPU memory remapping failure", "RESET_GPU"),
    74: Xid("NVLink error", "WORKFLOW_NVLINK_ERR"),
    79: Xid("GPU has fallen off the bus", "RESTART_BM"),
    92: Xid("high single-bit ECC error rate", "IGNORE", why="a card that NVIDIA's support should look at"),
    94: Xid("contained memory error", "RESTART_APP", why="of one application, which may be this one: it is restarted"),
    95: Xid("uncontained memory error", "RESET_GPU"),
    109: Xid("context switch timeout error", "RESET_GPU"),
    110: Xid("security fault error", "RESET_GPU"),
    119: Xid("GSP RPC timeout", "RESET_GPU"),
    120: Xid("GSP error", "RESET_GPU"),
    136: Xid("link training failed", "RESET_GPU"),
    140: Xid("ECC unrecovered error", "RESET_GPU"),
    143: Xid("GPU initialization error", "RESET_GPU"),
    151: Xid("key rotation error", "RESTART_VM"),
    155: Xid("NVLink: software defined error", "RESET_GPU"),
    156: Xid("resource retirement event", "RESET_GPU"),
    158: Xid("GPU fatal timeout", "RESET_GPU"),
    171: Xid("uncorrectable DRAM error", "", why="it comes with Xid 48 and says where"),
    172: Xid("uncorrectable SRAM error", "", why="it comes with Xid 48 and says where"),
}
UNKNOWN = Xid("not in the table", "")


def xid(code: int) -> Xid:
    return XIDS.get(code, UNKNOWN)
