"""Invoke tasks for users: parse, call the library, print. No logic.

Every import of the library's heavier parts is inside its task, so that `--list` answers at once.
"""

from __future__ import annotations

from typing import Any

from invoke.collection import Collection

from vdibuild.tasks import building, host, machines, pools, stations, systems, versions

namespace = Collection()


def _collect(name: str, default: str = "", **tasks: Any) -> None:
    """Add tasks under a common name. default: which of them the name alone means."""
    collection = Collection(name)
    for own, task in tasks.items():
        collection.add_task(task, own, default=own == default)
    namespace.add_collection(collection)


namespace.add_task(building.build_golden, "build-golden")
namespace.add_task(building.build_installer, "build-installer")
namespace.add_task(building.build_kiosk_iso, "build-kiosk-iso")
namespace.add_task(building.show_kickstart, "kickstart")
_collect("site", schema=building.site_schema)
_collect("windows", answers=building.windows_answers)
_collect(
    "images",
    default="list",
    list=versions.images,
    adopt=versions.images_adopt,
    show=versions.images_show,
    verify=versions.images_verify,
    promote=versions.images_promote,
    rollback=versions.images_rollback,
    gc=versions.images_gc,
)
namespace.add_task(systems.shrink)
_collect(
    "bundle",
    default="create",
    create=systems.bundle_create,
    publish=systems.bundle_publish,
    get=systems.bundle_get,
    unpack=systems.bundle_unpack,
)
namespace.add_task(machines.provision)
namespace.add_task(machines.deprovision)
namespace.add_task(stations.write_card, "write-card")
_collect("kiosk", configure=stations.kiosk_configure, cards=stations.kiosk_cards)
_collect(
    "pool",
    serve=pools.pool_serve,
    relay=pools.pool_relay,
    status=pools.pool_status,
    leases=pools.pool_leases,
    drain=pools.pool_drain,
    pause=pools.pool_pause,
    resume=pools.pool_resume,
    resize=pools.pool_resize,
    destroy=pools.pool_destroy,
    clear=pools.pool_clear,
    enrol=pools.pool_enrol,
    demo=pools.pool_demo,
)
namespace.add_task(host.doctor)
_collect("hypervisor", setup=host.hypervisor_setup)
