"""Published placement policies, in one model with ours: what each of them would do on the same cluster and loads.

They are written from their papers, not ported; ``source`` says where an algorithm stands, ``assumed`` what had to be filled in.
"""

from raymoe.placement.policy import Policy
from raymoe.placement.rivals.eplb import Eplb
from raymoe.placement.rivals.exhaustive import FssdpExhaustive
from raymoe.placement.rivals.fastermoe import FasterMoe, FasterMoeDevice
from raymoe.placement.rivals.flexmoe import FlexMoe
from raymoe.placement.rivals.fsdp import Fsdp
from raymoe.placement.rivals.laer import Laer
from raymoe.placement.rivals.lazarus import Lazarus
from raymoe.placement.rivals.pro_prophet import ProProphet
from raymoe.placement.rivals.smartmoe import SmartMoe
from raymoe.placement.rivals.symi import Symi

RIVALS: tuple[Policy, ...] = (
    Fsdp(),
    FasterMoe(),
    FasterMoeDevice(),
    SmartMoe(),
    FlexMoe(),
    ProProphet(),
    Eplb(),
    Laer(),
    Symi(),
    Lazarus(),
    FssdpExhaustive(),
)

__all__ = [
    "RIVALS",
    "Eplb",
    "FasterMoe",
    "FasterMoeDevice",
    "FlexMoe",
    "Fsdp",
    "FssdpExhaustive",
    "Laer",
    "Lazarus",
    "ProProphet",
    "SmartMoe",
    "Symi",
]
