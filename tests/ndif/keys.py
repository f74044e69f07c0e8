"""A Postgres with keys, of which one is trusted with the weights: without it the server takes any key.

Ran as root, Postgres becomes the user ``postgres``, or else ``nobody``.
"""

import os
import pwd
import shutil
import subprocess
import uuid
from pathlib import Path

TABLES = """
CREATE TABLE users (user_id uuid PRIMARY KEY, email text);
CREATE TABLE user_tags (user_tag_id int PRIMARY KEY, name text);
CREATE TABLE keys (key_id uuid PRIMARY KEY, user_id uuid);
CREATE TABLE key_user_tag_assignments (key_id uuid, user_tag_id int);
INSERT INTO users VALUES ('{user}', 'someone@example.org');
INSERT INTO user_tags VALUES (1, 'trusted');
INSERT INTO keys VALUES ('{trusted}', '{user}'), ('{untrusted}', '{user}');
INSERT INTO key_user_tag_assignments VALUES ('{trusted}', 1);
"""


def programs():
    """The folder of Postgres' programs, or None."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    return next((path for path in reversed(places) if (path / "initdb").exists()), None)


def start(stack, port):
    """Where the keys are, one that is trusted and one that is not."""
    where, data = programs(), stack.folder / "keys"
    data.mkdir()
    how = {}
    if os.geteuid() == 0:
        known = {one.pw_name: one for one in pwd.getpwall()}
        user = known.get("postgres") or known["nobody"]
        os.chown(data, user.pw_uid, user.pw_gid)
        how = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    made = ["--auth=trust", "--username=headwise", "--encoding=UTF8", "--no-sync"]
    subprocess.run([where / "initdb", "-D", data, *made], check=True, capture_output=True, cwd=data, **how)
    stack.start("postgres", str(where / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-F",
                "-c", "unix_socket_directories=", cwd=data, **how)  # fmt: skip
    url = f"postgresql://headwise@127.0.0.1:{port}/postgres"
    psql = [where / "psql", "--quiet", "--set=ON_ERROR_STOP=1", url]
    stack.wait("postgres", lambda: subprocess.run([*psql, "-c", ""], capture_output=True).returncode == 0, 60)
    trusted, untrusted, owner = (str(uuid.uuid4()) for _ in range(3))
    said = TABLES.format(user=owner, trusted=trusted, untrusted=untrusted)
    subprocess.run(psql, input=said, text=True, check=True, capture_output=True)
    return url, trusted, untrusted
