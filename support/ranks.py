"""The processes (ranks) of one launch: how they meet, add up their gradients and end together.

If a rank exits early, the others stop and report which one (PeerMonitor). With --shard the weights
are spread over the ranks, which then make every pass through the model in lockstep."""

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

from support.files import InputError


# ---- The launcher's environment variables --------------------------------------------------------

def environment_number(name, default):
    """The whole number >= 0 in an environment variable; `default` if it is unset or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise InputError(f"{name} is {text[:40]!r} in the environment, which is not a whole "
                         f"number: start by torchrun, or unset {name}")
    return int(text)


def rank_and_world():
    """(rank, number of ranks) as torchrun sets them; (0, 1) without it. Raises InputError for
    variables that a scheduler or an earlier launch left behind: they name ranks that nobody starts.
    """
    rank = environment_number("RANK", 0)
    world = environment_number("WORLD_SIZE", 1)
    unset = "start by torchrun, or, for a single process, unset RANK and WORLD_SIZE"
    if not 0 <= rank < world:
        raise InputError(f"the environment has RANK={rank} and WORLD_SIZE={world}, which do not "
                         f"belong together: {unset}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and missing:
        raise InputError(f"the environment has WORLD_SIZE={world} and no {missing[0]}: {unset}")
    return rank, world


# ---- Ranks ---------------------------------------------------------------------------------------

LONGEST_WAIT = timedelta(days=1)  # of a rank for the others

class Ranks:
    """This process among those of the launch; alone when not under torchrun.

    Every stage of a launch makes its own process group on the launcher's store. Keys of an earlier
    stage are still there, and a group that reads them hangs or calls a dead port, so each stage
    gets a prefix of its own."""

    def __init__(self, stage, device=None):
        self.rank, self.world = rank_and_world()
        self.restarts = environment_number("TORCHELASTIC_RESTART_COUNT", 0)
        self.main = self.rank == 0
        self.monitor = None
        self.device = choose_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            self.join(stage)

    def join(self, stage):
        """Meet the other ranks and make the process group of this stage."""
        # torchrun's agent holds the store already; without it, rank 0 does.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host = os.environ["MASTER_ADDR"]
        port = environment_number("MASTER_PORT", 0)
        try:
            store = dist.TCPStore(host, port, self.world, is_master=self.main and not agent)
        except (RuntimeError, OSError) as e:
            reason = " ".join(str(e).split())[:100]
            raise InputError(f"the {self.world} ranks that WORLD_SIZE promises did not meet at "
                             f"{host}:{port} ({reason}): start all of them by torchrun, or, for a "
                             "single process, unset WORLD_SIZE and RANK") from None
        number = os.environ.get("STUDY_STAGE", "")  # set by train.sh: a stage may come twice
        store = dist.PrefixStore(f"{number}{stage}/{self.restarts}", store)
        # One rank may fetch a model for an hour while others wait; the monitor finds dead ranks.
        # The store has a limit of its own, 300 s, and NCCL connects its ranks through it.
        store.set_timeout(LONGEST_WAIT)
        self.monitor = PeerMonitor(self, store, host)
        gpu = self.device if self.device.type == "cuda" else None
        # With device_id NCCL connects now, and not in the first collective.
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=self.rank,
                                world_size=self.world, timeout=LONGEST_WAIT, device_id=gpu)

    def sum(self, values):
        """The sums of a list of floats over all ranks, on every rank."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, params):
        """Sum the gradients over ranks in one flat all-reduce. Losses are already divided by the
        global count, so the sum is the gradient of the whole step. A parameter without a gradient
        gets zeros, on a single rank too: AdamW's moments then decay as on several ranks."""
        if self.world > 1:
            set_gradient(params, self.take_gradient(params))
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def take_gradient(self, params):
        """The gradient summed over ranks, as one flat tensor; the parameters are left without one.
        """
        parts = []
        for p in params:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            parts.append(grad.flatten())
        flat = torch.cat(parts)
        if self.world > 1:
            dist.all_reduce(flat)
        for p in params:
            p.grad = None
        return flat

    @contextmanager
    def together(self):
        """A context for work that needs the other ranks. If one of them has ended, the work fails
        with an error about sockets: wait for the monitor, which names the rank and ends this
        process."""
        try:
            yield
        except torch.OutOfMemoryError:       # this rank's own failure: say so at once
            raise
        except RuntimeError:
            if self.monitor is not None:
                time.sleep(5 * GRACE)
            raise

    def gather(self, items):
        """All ranks' lists as one, on every rank, in the order in which `items[rank::world]` gave
        them out."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        with self.together():
            dist.all_gather_object(parts, items)
        merged = []
        for i in range(max(map(len, parts))):
            for part in parts:
                if i < len(part):
                    merged.append(part[i])
        return merged

    def share(self, items):
        """This rank's part of a list. All ranks take part in every step: each needs one item."""
        if len(items) < self.world:
            raise InputError(f"{len(items)} posts are too few for {self.world} ranks: start fewer "
                             "ranks, or give more posts (in training by --batch)")
        return items[self.rank::self.world]

    def barrier(self):
        """Wait until every rank has come here."""
        if self.world > 1:
            with self.together():
                dist.barrier()

    def close(self):
        """Leave the other ranks: from here on this process may end without stopping them."""
        if self.monitor is not None:
            self.monitor.announce_exit()
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # FSDP keeps the group: a thread of gloo that frees its last tensors while Python ends
            # would abort the process.
            time.sleep(0.1)


def choose_device(name):
    """The torch.device that --device names; by default this rank's GPU, or the CPU without one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = name.partition(":")[0] == "cuda" and torch.cuda.is_available()
    if name != "cpu" and not is_gpu:
        raise InputError(f"--device {name}: there is no such device on this machine: use cpu, cuda "
                         "or cuda:N")
    local = environment_number("LOCAL_RANK", 0)
    ranks = environment_number("LOCAL_WORLD_SIZE", 1)
    count = torch.cuda.device_count()
    if name == "cuda" and 0 < count <= local:
        raise InputError(f"LOCAL_RANK is {local}, and this machine has {count} GPUs: start one "
                         f"rank per GPU (torchrun --nproc-per-node={count}), or, without torchrun, "
                         "unset LOCAL_RANK")
    if name == "cuda" and 0 < count < ranks:  # ranks that have one would wait for the others
        raise InputError(f"{ranks} ranks were started on this machine, which has {count} GPUs: "
                         f"start one rank per GPU (torchrun --nproc-per-node={count})")
    if name.startswith("cuda:") and ranks > 1:
        raise InputError(f"--device {name} would put all {ranks} ranks of this machine on one GPU: "
                         "leave --device out")
    return torch.device(f"cuda:{local}" if name == "cuda" else name)


def choose_dtype(name, device):
    """The torch.dtype of --dtype; auto: bfloat16 on a GPU, else float32. Raises InputError for
    bfloat16 on a GPU whose processors lack it."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name == "bfloat16" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise InputError(f"{torch.cuda.get_device_name(device)} (compute capability {major}."
                             f"{minor}) does not compute in bfloat16, which needs 8.0: give "
                             "--dtype float32, or use another GPU")
    return getattr(torch, name)


# ---- If a rank exits early -----------------------------------------------------------------------

GRACE = 2.0                      # seconds that a failing rank has to print its own error first


class PeerMonitor(threading.Thread):
    """Ends this process soon after another rank has ended without announcing it, and prints which.

    Each rank holds a connection to rank 0, which the system closes however a process ends, so a
    rank that is merely slow is never taken for a dead one. Two messages are sent over it: "bye"
    (this rank leaves, as planned) and the number of a rank that ended early."""

    def __init__(self, ranks, store, host):
        super().__init__(daemon=True)
        self.ranks = ranks
        self.peers = {}                            # connection -> the rank at its other end
        self.all_connected = threading.Event()
        self.leaving = False
        if ranks.main:
            key = secrets.token_bytes(16)          # keeps other programs' connections out
            self.listener = Listener(("", 0), backlog=ranks.world, authkey=key)
            store.set("watch", f"{self.listener.address[1]} {key.hex()}")
        else:
            port, key = store.get("watch").decode().split()
            connection = Client((host, int(port)), authkey=bytes.fromhex(key))
            connection.send_bytes(str(ranks.rank).encode())
            self.add(connection, 0)
        self.start()

    def add(self, connection, rank):
        """Monitor this connection; a machine that vanishes is noticed after 20 seconds."""
        self.peers[connection] = rank
        if hasattr(socket, "TCP_KEEPIDLE"):
            with socket.socket(fileno=os.dup(connection.fileno())) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def run(self):
        """The thread: accept the other ranks, then wait for what their connections report."""
        if self.ranks.main:
            self.accept_peers()
        self.all_connected.set()
        open_connections = set(self.peers)
        while open_connections:
            for connection in wait(list(open_connections)):
                message = self.receive(connection)
                if self.leaving or message == "bye":  # not closed: the peer awaits our "bye"
                    open_connections.discard(connection)
                else:
                    self.stop_process(int(message or self.peers[connection]))

    def accept_peers(self):
        """Rank 0: wait until every other rank has connected."""
        while len(self.peers) < self.ranks.world - 1:
            try:
                connection = self.listener.accept()
                self.add(connection, int(connection.recv_bytes(20)))
            except (OSError, EOFError, ValueError, AuthenticationError):  # not one of our ranks
                continue

    def receive(self, connection):
        """The next message of a peer; "" if its process has ended without one."""
        try:
            return connection.recv_bytes(20).decode()
        except (EOFError, OSError):
            if not self.leaving:
                time.sleep(GRACE)
            return ""

    def send_to_peers(self, message):
        """Send a message over every connection."""
        for connection in list(self.peers):
            try:
                connection.send_bytes(message.encode())
            except OSError:  # that rank has ended, too
                pass

    def announce_exit(self):
        """Tell the peers that this rank leaves as planned; ignore theirs ending from here on."""
        self.all_connected.wait(5 * GRACE)
        self.leaving = True
        self.send_to_peers("bye")

    def stop_process(self, rank):
        """End this process because `rank` has ended early; rank 0 passes the number on."""
        print(f"error: rank {rank} has ended before its time, so rank {self.ranks.rank} stops, "
              f"too: the last messages of rank {rank} say why; --resume goes on from the last "
              "checkpoint", file=sys.stderr, flush=True)
        if self.ranks.main:
            self.send_to_peers(str(rank))
        os._exit(1)


def set_gradient(params, flat):
    """Put a flat gradient back on the parameters: the inverse of Ranks.take_gradient."""
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)


class Signals:
    """A context in which SIGTERM and Ctrl-C are noted in `seen`, for the loop to stop after its
    step. A second signal ends the process at once if it comes a second later or more: under
    train.sh the launcher and the shell both pass on the same one."""

    def __enter__(self):
        self.seen = 0                              # the first signal's number
        self.before = {}                           # signal -> the handler to put back
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread, which alone may set handlers
                pass
        return self

    def note(self, number, frame):
        """The handler."""
        if self.seen and time.monotonic() - self.at > 1:
            os._exit(128 + number)
        if not self.seen:
            self.seen = number
            self.at = time.monotonic()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- Weights spread over the ranks: --shard ------------------------------------------------------

IDLE = 0                         # what a rank is about to do, see Lockstep
PASS_WITHOUT_GRADIENT = 1
PASS_WITH_GRADIENT = 2


class Lockstep:
    """Keeps ranks that share the weights in step: each pass through the model is made by all of
    them together. A rank without work of its own makes the others' passes with them, on one token
    whose result counts zero times."""

    def __init__(self, model, ranks):
        self.model = model
        self.waiting = False
        self.one_token = torch.zeros(1, 1, dtype=torch.long, device=ranks.device)

    def agree(self, kind):
        """The largest of what all ranks are about to do."""
        kind = torch.tensor([kind], device=self.one_token.device)
        dist.all_reduce(kind, dist.ReduceOp.MAX)
        return int(kind)

    def __call__(self):
        """Tell the other ranks of a pass; the model calls this before each."""
        if self.waiting:         # a pass made along with another rank's
            return
        self.agree(PASS_WITH_GRADIENT if torch.is_grad_enabled() else PASS_WITHOUT_GRADIENT)

    def wait(self):
        """Make the others' passes with them until every rank waits here: called at the end of each
        piece of work whose number of passes may differ."""
        self.waiting = True
        kind = self.agree(IDLE)
        while kind != IDLE:
            with_gradient = kind == PASS_WITH_GRADIENT
            with torch.set_grad_enabled(with_gradient):
                nothing = 0 * self.model.hidden(self.one_token).sum()
            if with_gradient:
                nothing.backward()
            kind = self.agree(IDLE)
        self.waiting = False


def shard(model, ranks):
    """Spread the blocks' frozen weights over the ranks by FSDP2: each rank holds its part, and a
    block is put together while it runs. Adapter, embedding and head stay whole on every rank, so
    gradients are summed as without --shard. On CPUs completions are those of whole weights, token
    for token (tested); on GPUs up to rounding, since whole weights decode by fused products."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    whole = set()
    for name, p in model.named_parameters():
        if ".layers." not in name or "lora_" in name:
            whole.add(p)
    if any(p.requires_grad for p in set(model.parameters()) - whole):
        raise InputError("--shard spreads a frozen base: with all weights training, leave it out")
    for p in whole:
        p.data = p.data.to(ranks.device)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=whole & set(module.parameters()))
    register_fsdp_forward_method(model, "hidden")
    model.lockstep = Lockstep(model, ranks)
