"""Slides that programs ask about by name: those below one folder, and what was selected of each, kept while it fits."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from sparsewsi.bags.bag import FEATURE_SUFFIXES, Bag, join
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.extract import encode_slide
from sparsewsi.bags.foreign import load_bag
from sparsewsi.model.prompt import build_prompt
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.phantom import example_slide
from sparsewsi.readers.pictures import PictureReader
from sparsewsi.report.case import Case, Messages, open_case
from sparsewsi.slides.confined import open_confined
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.remote import OPEN, Hosts, is_remote
from sparsewsi.slides.slide import open_slide

KEPT_BYTES = 512 << 20  # of features, of the slides that were asked about last
PHANTOM = "phantom"  # the name of the bundled example


class Library:
    """One model, one reader, and the slides below a folder. One thread at a time.

    root:   None: the phantom alone, and slides on servers
    hosts:  servers that slides may be read from
    reader: who answers, from pictures of the patches; None: the model's own LLM
    """

    def __init__(
        self,
        model: SparseWSI,
        root: Path | None,
        *,
        hosts: Hosts = OPEN,
        reader: PictureReader | None = None,
        kept_bytes: int = KEPT_BYTES,
    ):
        if root is not None and not root.is_dir():
            raise ValueError(f"There is no folder {root}; pass one that holds slides.")
        self.model, self._root, self._hosts = model, root and root.resolve(), hosts
        self.reader = model if reader is None else reader
        self._encoder, self._kept_bytes = load_encoder(model.config.encoder), kept_bytes
        self._cases: OrderedDict[tuple, Case] = OrderedDict()

    def find(self, name: str) -> Path:
        """The slide that a name means. Raises SlideError for what is not below the folder, however it is written."""
        if name == PHANTOM:
            return example_slide()
        if is_remote(name):
            return Path(name)
        unknown = SlideError("There is no such slide on this server; name one by its path below the server's folder.")
        try:
            path = (self._root or Path("/nowhere")).joinpath(unquote(name)).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise unknown from None
        if self._root is None or path == self._root or not path.is_relative_to(self._root):
            raise unknown
        return path

    def open(
        self, names: Sequence[tuple[str, float | None]], progress: Callable[[int, int], None] | None = None
    ) -> Case:
        """What the model selects of slides, (name, um/px or None) each, as one case. What progress raises ends it.

        A slide is encoded now unless it is still at hand. Raises ValueError for a slide that comes twice.
        """
        paths = [(self.find(name), slide_mpp) for name, slide_mpp in names]
        key = tuple(_name_file(path, slide_mpp) for path, slide_mpp in paths)
        if key in self._cases:
            self._cases.move_to_end(key)
            return self._cases[key]
        if len(paths) == 1:
            [(path, slide_mpp)] = paths
            features = path.suffix.lower() in FEATURE_SUFFIXES and not is_remote(path)
            bag = load_bag(path, slide_mpp=slide_mpp) if features else self._encode(path, slide_mpp, progress)
            case = open_case(self.model, bag, None if features else path, slide_mpp=slide_mpp)
        else:
            alone = [self.open([one], progress) for one in names]
            bags = [one.bag for one in alone]
            if twice := [bag.slide for place, bag in enumerate(bags) if bag.slide in [b.slide for b in bags[:place]]]:
                raise ValueError(f"{twice[0]} is named twice; a case is of different slides.")
            pictured = [path for one in alone for path in one.slides]
            case = open_case(self.model, join(bags), pictured if len(pictured) == len(bags) else None)
        self._cases[key] = case
        while len(self._cases) > 1 and sum(map(_count_bytes, self._cases.values())) > self._kept_bytes:
            self._cases.popitem(last=False)
        return case

    def count_tokens(self, case: Case, messages: Messages, options: list[str], text: str) -> tuple[int, int] | None:
        """Tokens of the prompt, with the visual ones, and of the answer; None of a reader of pictures."""
        if self.reader is not self.model:
            return None
        prompt = build_prompt(self.model.tokenizer, messages, options or None)
        answer = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return len(prompt.ids) + len(case.selection.indices), len(answer)

    def _encode(self, path: Path, slide_mpp: float | None, progress: Callable[[int, int], None] | None) -> Bag:
        config = self.model.config
        if is_remote(path):
            opened = open_slide(path, slide_mpp=slide_mpp, hosts=self._hosts)
        else:
            opened = open_confined(path, slide_mpp=slide_mpp)
        with opened as slide:
            how = {"mpp": config.mpp, "patch_size": config.patch_size, "progress": progress}
            return encode_slide(slide, self._encoder, **how)


def _name_file(path: Path, slide_mpp: float | None) -> tuple:
    """What is the same only for the same content, read at the same resolution."""
    seen = (0, 0) if is_remote(path) else (path.stat().st_mtime_ns, path.stat().st_size)
    return str(path), slide_mpp, *seen


def _count_bytes(case: Case) -> int:
    return case.bag.features.nbytes
