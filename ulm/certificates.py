"""Trust in one certificate: for asking an endpoint of one's own, by whatever address."""

from __future__ import annotations

import ssl


def trusting(certificate: str | None) -> ssl.SSLContext | bool:
    """httpx's `verify` for a server that must show this certificate, a PEM file; None: any that the system trusts."""
    if certificate is None:
        return True
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be a root
    return context
