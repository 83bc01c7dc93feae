"""What each tenant holds, and is entitled to: weight, guarantee, limit, urgent allowance. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.core.job import TenantShare
from cluster.core.policy import Policy


@dataclass
class Account:
    """`held`: slots of its turns that have not ended; parked jobs hold none."""

    share: TenantShare
    held: int = 0
    urgent: int = 0

    @property
    def room(self) -> int | None:
        """How many slots it may still take; None: no limit."""
        return None if self.share.max_slots is None else self.share.max_slots - self.held

    def is_owed(self, slots: int) -> bool:
        """Whether so many more would still be its own."""
        return self.held + slots <= self.share.guaranteed_slots

    def admits(self, slots: int) -> bool:
        return self.room is None or slots <= self.room

    @property
    def depends(self) -> bool:
        """Whether what its jobs may do changes with what it holds."""
        return self.share.guaranteed_slots > 0 or self.share.max_slots is not None


class Ledger:
    """The accounts of all tenants. `capacity`: slots of all nodes that take jobs."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._accounts: dict[str, Account] = {}
        self.capacity = 0
        self._urgent = 0  # in all, of each tenant no more than its allowance
        self._with_urgent: set[str] = set()

    def account(self, tenant: str) -> Account:
        found = self._accounts.get(tenant)
        if found is None:
            found = self._accounts[tenant] = Account(TenantShare(tenant))
        return found

    def set(self, share: TenantShare) -> None:
        account = self.account(share.name)
        self._urgent -= self._counted(account)
        account.share = share
        self._urgent += self._counted(account)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self._urgent = sum(self._counted(self._accounts[name]) for name in self._with_urgent)

    def hold(self, tenant: str, slots: int, urgent: bool) -> None:
        """Negative `slots`: it lets go of them."""
        account = self.account(tenant)
        account.held += slots
        if urgent:
            self._urgent -= self._counted(account)
            account.urgent += slots
            self._urgent += self._counted(account)
            self._with_urgent.add(tenant) if account.urgent else self._with_urgent.discard(tenant)

    def urgent_allowance(self, account: Account) -> int:
        own = account.share.urgent_slots
        return max(1, int(self._policy.urgent_share_of_tenant * self.capacity)) if own is None else own

    def urgent_capacity(self) -> int:
        return max(1, int(self._policy.urgent_share * self.capacity))

    def admits_urgent(self, tenant: str, slots: int) -> bool:
        """Whether an urgent job of so many slots would be within its tenant's allowance, and all tenants' together."""
        account = self.account(tenant)
        within = account.urgent + slots <= self.urgent_allowance(account)
        return within and self._urgent + slots <= self.urgent_capacity()

    def urgent_within(self, tenant: str) -> bool:
        """Whether the urgent jobs that it runs are within its allowance."""
        account = self.account(tenant)
        return account.urgent <= self.urgent_allowance(account)

    def _counted(self, account: Account) -> int:
        return min(account.urgent, self.urgent_allowance(account))

    def shares(self) -> dict[str, TenantShare]:
        return {name: one.share for name, one in self._accounts.items() if one.share != TenantShare(name)}

    def accounts(self) -> Mapping[str, Account]:
        return self._accounts


def jain(values: Iterable[float]) -> float:
    """Jain's index: 1 when all are equal, 1/n when one has everything."""
    found = list(values)
    squares = sum(value * value for value in found)
    return sum(found) ** 2 / (len(found) * squares) if squares else 1.0
