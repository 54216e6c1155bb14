"""How people are told: what arrives at Slack, in a mailbox, at any address. Each at a receiver on this machine."""

import socketserver
import threading
from contextlib import contextmanager
from email import message_from_bytes, policy

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook

from ddops.flows.automations import notification_block
from helpers.prefect_world import Receiver

SUBJECT, BODY = "ddops: retrain is Refused", "gate: exceeded by 5.5"


@contextmanager
def mail_server():
    """(port, mails): a server of the least of SMTP, which keeps what it is sent."""
    mails = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(b"220 ready\r\n")
            while line := self.rfile.readline():
                command = line.split()[0].upper() if line.split() else b""
                if command == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    mails.append(b"".join(iter(self.rfile.readline, b".\r\n")))
                self.wfile.write(b"221 bye\r\n" if command == b"QUIT" else b"250 ok\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], mails
        server.shutdown()


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


def test_any_address_gets_json(receiver):
    block = notification_block(receiver.url)
    assert isinstance(block, CustomWebhookNotificationBlock)
    block.notify(BODY, SUBJECT)
    assert receiver.received == [{"subject": SUBJECT, "body": BODY}]


def test_slack_gets_a_message_of_its_own_form(receiver, monkeypatch):
    block = notification_block("https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ")
    assert isinstance(block, SlackWebhook)
    monkeypatch.setattr("apprise.plugins.slack.NotifySlack.webhook_url", receiver.url)
    block.notify(BODY, SUBJECT)
    (message,) = receiver.received
    (attachment,) = message["attachments"]
    assert (attachment["title"], attachment["text"]) == (SUBJECT, BODY)


def test_a_mailbox_gets_a_mail():
    with mail_server() as (port, mails):
        url = f"mailto://127.0.0.1:{port}/?from=ddops@example.invalid&to=team@example.invalid"
        notification_block(url).notify(BODY, SUBJECT)
    mail = message_from_bytes(mails[0], policy=policy.default)
    assert mail["Subject"] == SUBJECT
    assert "team@example.invalid" in mail["To"]
    assert BODY in mail.get_body().get_content()
