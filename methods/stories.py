"""The domain `stories`: prompts that are put to the model as they are."""

from data import Domain, Replies
from support.registry import DOMAINS


@DOMAINS.add("stories", "prompts to be answered freely")
class Stories(Replies):
    """Prompts for stories and other free answers, with or without people's answers. Completions are
    scored by a reward model or a judge, and by their diversity."""
    name = "stories"

    @staticmethod
    def claims(post):
        return post.prompt and not post.styles

    messages = Domain.messages               # the prompt alone
