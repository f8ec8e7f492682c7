"""The processes of one launch: how they find each other, add their gradients, end together.

A rank that ends before its time takes the others with it, and they name it. With --shard the
weights are spread over the ranks, which then go through the model in lockstep. Nothing else reads
RANK and WORLD_SIZE but what the first rank does alone: messages, splits, adapters.run_wise."""

import os
import secrets
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, wait

import torch
import torch.distributed as dist

from data import InputError

# ---- What the launcher says ----------------------------------------------------------------------

def environment_number(name, default):
    """The whole number >= 0 in an environment variable; `default` if it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise InputError(f"{name} is {text[:40]!r} in the environment, which is no whole number: "
                         f"start by torchrun, or unset {name}")
    return int(text)


def rank_and_world():
    """(rank, number of ranks) as torchrun sets them; (0, 1) without it. Raises for variables that
    a scheduler or an earlier launch left behind, which name ranks that nobody starts."""
    rank, world = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    unset = "start by torchrun, or, for a single process, unset RANK and WORLD_SIZE"
    if not 0 <= rank < world:
        raise InputError(f"the environment has RANK={rank} and WORLD_SIZE={world}, which do not "
                         f"belong together: {unset}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and missing:
        raise InputError(f"the environment has WORLD_SIZE={world} and no {missing[0]}: {unset}")
    return rank, world


# ---- Ranks ---------------------------------------------------------------------------------------

class Ranks:
    """This process among those of the launch; alone when not under torchrun.

    Every stage of train.sh makes its own group on the launcher's store. Keys of an earlier stage
    are still there, and a group that reads them hangs or calls a dead port, so each stage gets a
    prefix of its own."""

    def __init__(self, stage, device=None):
        self.rank, self.world = rank_and_world()
        self.restarts = environment_number("TORCHELASTIC_RESTART_COUNT", 0)
        self.main = self.rank == 0
        self.watch = None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        cuda = device.partition(":")[0] == "cuda" and torch.cuda.is_available()
        if not (device == "cpu" or cuda):
            raise InputError(f"--device {device}: there is no such device here")
        local = environment_number("LOCAL_RANK", 0)
        count = torch.cuda.device_count()
        if device == "cuda" and 0 < count <= local:
            raise InputError(f"LOCAL_RANK is {local}, and this machine has {count} GPUs: start one "
                             "rank per GPU, or, without torchrun, unset LOCAL_RANK")
        self.device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            self.join(stage)

    def join(self, stage):
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = os.environ["MASTER_ADDR"], environment_number("MASTER_PORT", 0)
        try:
            store = dist.TCPStore(host, port, self.world, is_master=self.main and not agent)
        except (RuntimeError, OSError) as e:
            reason = " ".join(str(e).split())[:100]
            raise InputError(f"the {self.world} ranks that WORLD_SIZE promises did not meet at "
                             f"{host}:{port} ({reason}): start all of them by torchrun, or, for a "
                             "single process, unset WORLD_SIZE and RANK") from None
        number = os.environ.get("STUDY_STAGE", "")  # of train.sh: a stage may come twice
        store = dist.PrefixStore(f"{number}{stage}/{self.restarts}", store)
        self.watch = Watch(self, store, host)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        # One rank may fetch a model for an hour while others wait: who died, Watch says.
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world,
                                timeout=timedelta(days=1))

    def sum(self, values):
        """Sums of a list of floats over all ranks, on all ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, params):
        """Gradients summed over ranks in one flat all-reduce. Losses are already divided by the
        global count, so the sum is the gradient of the whole step; a parameter without a gradient
        on this rank counts as zero, alone too: AdamW's moments go on as they would on two ranks."""
        if self.world > 1:
            set_gradient(params, self.take_gradient(params))
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def take_gradient(self, params):
        """The gradient over all ranks as one flat tensor; the parameters are left without one."""
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in params)
        flat = torch.cat([g.flatten() for g in grads])
        if self.world > 1:
            dist.all_reduce(flat)
        for p in params:
            p.grad = None
        return flat

    @contextmanager
    def together(self):
        """Within: work that needs the other ranks. When one of them has ended it fails in words
        about sockets; the watch has better ones, and ends this process meanwhile."""
        try:
            yield
        except RuntimeError:
            if self.watch is not None:
                time.sleep(5 * GRACE)
            raise

    def gather(self, items):
        """Every rank's list, on every rank, in the order in which `items[rank::world]`
        dealt them."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        with self.together():
            dist.all_gather_object(parts, items)
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def barrier(self):
        if self.world > 1:
            with self.together():
                dist.barrier()

    def close(self):
        if self.watch is not None:
            self.watch.farewell()
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # FSDP keeps the group: a thread of gloo that frees its last tensors while Python ends
            # would abort the process.
            time.sleep(0.1)


GRACE = 2.0                      # seconds that a rank has for a message of its own


class Watch(threading.Thread):
    """Ends this process soon after another rank has ended without a farewell. Each rank holds a
    connection to rank 0, which the system closes however a process ends: a rank that is merely
    slow is never taken for a dead one."""

    def __init__(self, ranks, store, host):
        super().__init__(daemon=True)
        self.ranks, self.peers = ranks, {}         # {connection: rank}
        self.complete, self.leaving = threading.Event(), False
        if ranks.main:
            key = secrets.token_bytes(16)          # a stranger is not listened to
            self.listener = Listener(("", 0), backlog=ranks.world, authkey=key)
            store.set("watch", f"{self.listener.address[1]} {key.hex()}")
        else:
            port, key = store.get("watch").decode().split()
            connection = Client((host, int(port)), authkey=bytes.fromhex(key))
            connection.send_bytes(str(ranks.rank).encode())
            self.add(connection, 0)
        self.start()

    def add(self, connection, rank):
        """Watch it; a machine that vanishes is noticed after 20 seconds."""
        self.peers[connection] = rank
        if hasattr(socket, "TCP_KEEPIDLE"):
            with socket.socket(fileno=os.dup(connection.fileno())) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in (("IDLE", 5), ("INTVL", 5), ("CNT", 3)):
                    s.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{option}"), value)

    def run(self):
        while self.ranks.main and len(self.peers) < self.ranks.world - 1:
            try:
                connection = self.listener.accept()
                self.add(connection, int(connection.recv_bytes(20)))
            except (OSError, EOFError, ValueError, AuthenticationError):  # a stranger
                continue
        self.complete.set()
        watched = set(self.peers)
        while watched:
            for connection in wait(list(watched)):
                try:
                    word = connection.recv_bytes(20).decode()
                except (EOFError, OSError):
                    word = ""
                    time.sleep(0 if self.leaving else GRACE)
                if self.leaving or word == "bye":  # kept open: it waits for this rank's farewell
                    watched.discard(connection)
                else:
                    self.end(int(word or self.peers[connection]))

    def tell(self, word):
        for connection in list(self.peers):
            try:
                connection.send_bytes(word.encode())
            except OSError:  # gone, too
                pass

    def farewell(self):
        """Before a rank leaves for good: whoever ends from here on does no harm."""
        self.complete.wait(5 * GRACE)
        self.leaving = True
        self.tell("bye")

    def end(self, rank):
        print(f"error: rank {rank} has ended before its time, so rank {self.ranks.rank} ends, too: "
              f"what it said last tells why; --resume goes on from the last checkpoint",
              file=sys.stderr, flush=True)
        if self.ranks.main:
            self.tell(str(rank))
        os._exit(1)


def set_gradient(params, flat):
    """The inverse of Ranks.take_gradient."""
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)


class Signals:
    """Within: SIGTERM and Ctrl-C are noted in `seen`, for the loop to leave after its step; a
    second one, a second later or more, leaves at once: under train.sh the launcher and the shell
    both pass the same one on."""

    def __enter__(self):
        self.seen, self.before = 0, {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread: somebody else's business
                pass
        return self

    def note(self, number, frame):
        if self.seen and time.monotonic() - self.at > 1:
            os._exit(128 + number)
        if not self.seen:
            self.seen = number
            self.at = time.monotonic()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Lockstep:
    """With weights that are spread over ranks, each pass through the model is made by all of them
    together. A rank that has no more to do makes the others' passes with them, on nothing."""

    def __init__(self, model, ranks):
        self.model, self.waiting = model, False
        self.nothing = torch.zeros(1, 1, dtype=torch.long, device=ranks.device)

    def agree(self, kind):
        """The largest of all ranks' numbers."""
        kind = torch.tensor([kind], device=self.nothing.device)
        dist.all_reduce(kind, dist.ReduceOp.MAX)
        return int(kind)

    def __call__(self):
        """Before each pass: 1 says that it is without gradient, 2 with."""
        if not self.waiting:
            self.agree(1 + torch.is_grad_enabled())

    def wait(self):
        """Returns when all ranks wait: at the end of each piece of work whose passes may differ."""
        self.waiting = True
        while kind := self.agree(0):
            with torch.set_grad_enabled(kind == 2):
                nothing = 0 * self.model.hidden(self.nothing).sum()
            if kind == 2:
                nothing.backward()
        self.waiting = False


def shard(model, ranks):
    """Spread the blocks' frozen weights over the ranks by FSDP2: each holds its part, and a block
    comes together while it runs. The adapter, embedding and head stay whole on every rank:
    gradients are summed as ever."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    whole = {p for n, p in model.named_parameters() if ".layers." not in n or "lora_" in n}
    if any(p.requires_grad for p in set(model.parameters()) - whole):
        raise InputError("--shard spreads a frozen base: with all weights training, leave it out")
    for p in whole:
        p.data = p.data.to(ranks.device)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=whole & set(module.parameters()))
    register_fsdp_forward_method(model, "hidden")
    model.lockstep = Lockstep(model, ranks)
