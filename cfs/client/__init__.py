"""Clients of the service, synchronous and asynchronous (spec cli-and-varlink b, c).

A method of an interface is a class whose fields are the parameters, and both clients take it::

    from cfs.client import Client
    from cfs.client.oci import ListImages

    with Client() as client, client.opened("/srv/store") as store:
        for image in client.call(ListImages(store.handle)).images:
            print(image.name, image.manifest_digest)

``client.stream`` yields the replies of methods that send several, and ``AsyncClient`` has the same
methods to ``await``.  Replies that bring descriptors are context managers that close them.  Methods
are in :mod:`cfs.client.repository`, :mod:`cfs.client.oci`, :mod:`cfs.client.layers` and
:mod:`cfs.client.service`, errors in :mod:`cfs.client.errors`.
"""

from typing import TYPE_CHECKING

from cfs.lazy import load_lazily

if TYPE_CHECKING:
    from cfs.client.asynchronous import AsyncClient
    from cfs.client.blocking import Client
    from cfs.client.errors import VarlinkError

__all__ = ["AsyncClient", "Client", "VarlinkError"]

__getattr__ = load_lazily(
    __name__,
    {"asynchronous": ["AsyncClient"], "blocking": ["Client"], "errors": ["VarlinkError"]},
)
