// SPDX-License-Identifier: GPL-2.0-only
/*
 * The commands that change a device while it is in use: set and rebase.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"

/* What set is asked for, beside what the keys that are given say. */
struct change {
	struct cow_table table;		/* its features */
	uint64_t bytes;
	const char *watched;		/* switches cow-on-read, or NULL */
	bool partitions;
};

static int parse_change(const struct args *args, struct change *change)
{
	const char *cache = args->value[KEY_CACHE];
	bool any = false;

	for (int i = 0; i < KEY_COUNT; i++)
		any = any || args->value[i];
	if (!any)
		return fail(-EINVAL, "set: what to change is missing; see \"cowctl help set\"");
	if (cache && strcmp(cache, "drop"))
		return fail(-EINVAL, "cache=%s is not drop", cache);
	return parse_features(args, &change->table, &change->watched) ?:
	       parse_bytes(args, KEY_SIZE, &change->bytes) ?:
	       parse_flag(args, KEY_PARTITIONS, false, &change->partitions);
}

static int send_limit(const struct args *args, enum key key, const char *name, uint64_t blocks)
{
	char *message;
	int err;

	if (!args->value[key])
		return 0;
	message = blocks == NO_LIMIT ? xasprintf("%s none", name) :
		  xasprintf("%s %" PRIu64, name, blocks);
	err = dm_message(args, message);
	free(message);
	return err;
}

static int send_flag(const struct args *args, enum key key, const char *name, bool on)
{
	char *message;
	int err;

	if (!args->value[key])
		return 0;
	message = xasprintf("%s %s", name, on ? "on" : "off");
	err = dm_message(args, message);
	free(message);
	return err;
}

/* After a reload, which may have taken an older state of cow-on-read along. */
static int restart_watch(const struct cow *cow)
{
	char path[PATH_MAX];

	return watch_find(cow->mangled, path) ? 0 : watch_start(cow, path);
}

static int grow(const struct args *args, uint64_t bytes)
{
	struct cow cow;
	int err;

	if (!bytes)
		return 0;
	/* Again, for the table has changed. */
	err = find_cow(args, &cow);
	bytes -= bytes % BLOCK_BYTES;
	if (!err && bytes < cow.sectors * SECTOR_BYTES)
		return fail(-EINVAL, "size=%s: %s has %" PRIu64 " bytes, and cannot shrink",
			    args->value[KEY_SIZE], args->name, cow.sectors * SECTOR_BYTES);
	if (err || bytes == cow.sectors * SECTOR_BYTES)
		return err;
	return dm_reload(&cow, bytes / SECTOR_BYTES, cow.params, false) ?: restart_watch(&cow);
}

static int switch_cow_on_read(const struct args *args, const struct cow *cow,
			      const struct change *change)
{
	if (!args->value[KEY_COW_ON_READ])
		return 0;
	if (change->watched)
		return watch_start(cow, change->watched);
	watch_stop(cow->mangled);
	return send_flag(args, KEY_COW_ON_READ, "cow_on_read", change->table.cow_on_read);
}

static int settle(const struct cow *cow);

/* What a killed rebase has left is put in order, or the base would not be known. */
static int switch_reconnect(const struct args *args, const struct cow *cow, bool queue)
{
	if (!args->value[KEY_ON_BASE_ERROR] || (queue && reconnect_runs(cow->mangled)))
		return 0;
	/* holes=false may have been said; they only save work. */
	return (queue ? settle(cow) : 0) ?: reconnect_start(cow->mangled, false);
}

/* Partitions that have devices follow a new size; or as it was said. */
static int refresh_parts(const struct args *args, const struct cow *cow, bool wanted)
{
	int n;

	if (args->value[KEY_PARTITIONS] && !wanted) {
		n = check_parts_closed(cow, "");
		return n > 0 ? parts_unmap(cow->path) : n;
	}
	n = parts_find(cow, NULL);
	return wanted || (n && args->value[KEY_SIZE]) ? parts_map(cow->path, false) : 0;
}

/* What cannot be undone comes last. */
static int apply(const struct args *args, const struct cow *cow, const struct change *change)
{
	const struct cow_table *table = &change->table;

	return send_limit(args, KEY_LIMIT, "limit", table->limit_blocks) ?:
	       send_limit(args, KEY_CACHE_LIMIT, "cache_limit", table->cache_limit_blocks) ?:
	       send_flag(args, KEY_COW_ON_CACHE, "cow_on_cache", table->cow_on_cache) ?:
	       grow(args, change->bytes) ?:
	       switch_cow_on_read(args, cow, change) ?:
	       refresh_parts(args, cow, change->partitions) ?:
	       send_flag(args, KEY_ON_BASE_ERROR, "queue_errors", table->queue_errors) ?:
	       switch_reconnect(args, cow, table->queue_errors) ?:
	       (args->value[KEY_CACHE] ? dm_message(args, "drop_cache") : 0);
}

/* The old table has all that was changed; @had_parts: there were devices of partitions. */
static void undo(const struct args *args, const struct cow *cow, const char *watched,
		 bool had_parts)
{
	struct cow now;

	watch_stop(cow->mangled);
	if (!dm_find(args->mangled, &now) && now.state == COW_LIVE &&
	    (now.sectors != cow->sectors || strcmp(now.params, cow->params)))
		dm_reload(cow, cow->sectors, cow->params, true);
	if (*watched)
		watch_start(cow, watched);
	if (args->value[KEY_PARTITIONS] || args->value[KEY_SIZE]) {
		if (had_parts)
			parts_map(cow->path, true);
		else if (parts_find(cow, NULL))
			parts_unmap(cow->path);
	}
	switch_reconnect(args, cow, cow->table.queue_errors);
}

int cmd_set(const struct args *args)
{
	char watched[PATH_MAX] = "";
	struct change change;
	struct cow cow;
	bool had_parts;
	int err, lock;

	err = parse_change(args, &change);
	if (err)
		return err;
	lock = lock_name(args);
	if (lock < 0)
		return lock;
	err = find_cow(args, &cow);
	if (!err) {
		watch_find(cow.mangled, watched);
		had_parts = parts_find(&cow, NULL);
		err = apply(args, &cow, &change);
		if (err)
			undo(args, &cow, watched, had_parts);
	}
	close(lock);
	return err;
}

/*
 * Moving to another base
 */

#define SAMPLES	256
#define READ_MS	10000

/* What is known of the new base. */
enum sameness {
	COMPARED,			/* it is to be compared with the old one */
	PROMISED,			/* by the user */
	SAME_SERVER,			/* as before; to be used only while the old one fails */
};

/* Return: whether block device @upper is, or is made of, the one at @lower. */
bool stands_on(const char *name, dev_t upper, void *lower)
{
	struct stat file;

	(void)name;
	return upper == *(dev_t *)lower || any_link(upper, "slaves", stands_on, lower) ||
	       /* the kernel has no such link for it */
	       (loop_file(upper, &file) && file.st_rdev && stands_on(NULL, file.st_rdev, lower));
}

/* Return: 0, -EILSEQ when the blocks differ, -EIO or -EREMOTEIO for old or new. */
static int compare_block(int old, int new, uint64_t block, uint64_t end)
{
	uint64_t start = block * BLOCK_BYTES;
	ssize_t bytes = end - start < BLOCK_BYTES ? end - start : BLOCK_BYTES;
	char was[BLOCK_BYTES], is[BLOCK_BYTES];

	if (pread(old, was, bytes, start) != bytes)
		return -EIO;
	if (pread(new, is, bytes, start) != bytes)
		return -EREMOTEIO;
	return memcmp(was, is, bytes) ? -EILSEQ : 0;
}

/* The first block, the last one, and one somewhere in each part between them. */
static uint64_t sample(uint64_t i, uint64_t samples, uint64_t blocks)
{
	uint64_t first, next, random;

	if (!i || samples == blocks)
		return i;
	if (i == samples - 1)
		return blocks - 1;
	first = blocks / samples * i;
	next = blocks / samples * (i + 1);
	if (getrandom(&random, sizeof(random), 0) != sizeof(random))
		random = 0;
	return first + random % (next - first);
}

static int fail_uncomparable(const struct args *args, const struct base *base, const char *why)
{
	return fail(-EIO, "the base of %s %s, so nothing can be compared; "
		    "say force=true if %s has the same content", args->name, why, base->text);
}

struct comparison {
	const struct args *args;
	const struct base *base;
	int old;
	uint64_t old_bytes;
	uint64_t samples;
};

static int compare(void *arg)
{
	const struct comparison *comparison = arg;
	const struct args *args = comparison->args;
	const struct base *base = comparison->base;
	uint64_t blocks = count_blocks(comparison->old_bytes);

	posix_fadvise(comparison->old, 0, 0, POSIX_FADV_RANDOM);
	posix_fadvise(base->fd, 0, 0, POSIX_FADV_RANDOM);
	for (uint64_t i = 0; i < comparison->samples; i++) {
		uint64_t block = sample(i, comparison->samples, blocks);
		int err = compare_block(comparison->old, base->fd, block, comparison->old_bytes);

		if (err == -EILSEQ)
			return fail(err, "base %s differs from the base of %s, at byte %" PRIu64,
				    base->text, args->name, block * BLOCK_BYTES);
		if (err == -EIO)
			return fail_uncomparable(args, base, "cannot be read");
		if (err == -EREMOTEIO)
			return fail(err, "cannot read base %s", base->text);
	}
	return 0;
}

/* In a process of its own: the old base may be moved away from because it hangs. */
static int compare_apart(const struct args *args, int old, uint64_t old_bytes,
			 const struct base *base, uint64_t *compared)
{
	uint64_t blocks = count_blocks(old_bytes);
	struct comparison comparison = {
		.args = args, .base = base, .old = old, .old_bytes = old_bytes,
		.samples = blocks < SAMPLES ? blocks : SAMPLES,
	};
	int err = call_apart(compare, &comparison, -1, false);

	if (!err)
		*compared = comparison.samples;
	return err;
}

/* Whether the new base can take the place of the old one. */
static int check_same(const struct args *args, const struct cow *cow, const struct base *base,
		      enum sameness same, uint64_t *compared, uint64_t *old_bytes)
{
	char *path = device_path(cow->table.major, cow->table.minor);
	int old = open(path, O_RDONLY | O_CLOEXEC), err = 0;
	dev_t self = makedev(cow->major, cow->minor);

	*compared = 0;
	if (old < 0 || ioctl(old, BLKGETSIZE64, old_bytes))
		*old_bytes = 0;
	if (stands_on(NULL, base->dev, &self))
		err = fail(-EBUSY, "base %s is %s itself, or made of it", base->text, args->name);
	else if (base->bytes < *old_bytes)
		err = fail(-EIO, "base %s has %" PRIu64 " bytes, fewer than the %" PRIu64
			   " of the base of %s", base->text, base->bytes, *old_bytes, args->name);
	else if (same == COMPARED && !*old_bytes)
		err = fail_uncomparable(args, base, "is away");
	else if (same == COMPARED)
		err = compare_apart(args, old, *old_bytes, base, compared);
	if (old >= 0)
		close(old);
	free(path);
	return err;
}

static int reload_on(const struct cow *cow, const struct base *base)
{
	const char *features = cow->params + strcspn(cow->params, " ");
	char *params = xasprintf("%u:%u%s", major(base->dev), minor(base->dev), features);
	int err = dm_reload(cow, cow->sectors, params, false);

	free(params);
	return err;
}

/*
 * A killed rebase may have left two connections, and a table that is not in use.
 * The device tells which connection it uses.
 */
static int settle(const struct cow *cow)
{
	char *dev = device_path(cow->table.major, cow->table.minor), slot[SLOT_BYTES];
	struct nbd_link link;
	bool moved;

	nbd_next_slot(cow->mangled, slot);
	dm_clear(cow->mangled);
	moved = !nbd_find(slot, &link) && link.connected && !strcmp(link.dev, dev);

	free(dev);
	if (!moved)
		return nbd_release(slot);
	return nbd_release(cow->mangled) ?: nbd_rename(slot, cow->mangled);
}

/* And not only from memory. */
static int read_first_block(void *arg)
{
	char block[BLOCK_BYTES];
	int fd = *(int *)arg;

	posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	return pread(fd, block, sizeof(block), 0) > 0 ? 0 : -EIO;
}

static int read_base(void *arg)
{
	const struct cow *cow = arg;
	char *path = device_path(cow->table.major, cow->table.minor);
	int fd = open(path, O_RDONLY | O_CLOEXEC), err = fd < 0 ? -errno : read_first_block(&fd);

	if (fd >= 0)
		close(fd);
	free(path);
	return err;
}

/* Whether the base of a device can be read now. */
bool base_answers(const struct cow *cow)
{
	return !call_apart(read_base, (void *)cow, READ_MS, false);
}

static bool base_fails(const char *mangled)
{
	struct cow now;

	return !dm_find(mangled, &now) && now.state == COW_LIVE &&
	       !strcmp(now.status.health, "base-error");
}

/* Moves the device; when that fails it is where it was. */
static int move(const struct args *args, const struct cow *cow, struct base *base,
		enum sameness same)
{
	uint64_t compared, old_bytes;
	int err = check_same(args, cow, base, same, &compared, &old_bytes);

	/* Others wait for the lock meanwhile. */
	if (!err && same == SAME_SERVER &&
	    (call_apart(read_first_block, &base->fd, READ_MS, false) || !base_fails(cow->mangled)))
		err = -EAGAIN;
	if (!err && interrupted())
		err = -EINTR;
	if (!err)
		err = reload_on(cow, base);
	if (err)
		return err;
	err = restart_watch(cow);
	if (err) {
		dm_reload(cow, cow->sectors, cow->params, true);
		return err;
	}
	if (compared && !args->json)
		printf("compared %" PRIu64 " of %" PRIu64 " blocks with the old base: the same\n",
		       compared, count_blocks(old_bytes));
	return 0;
}

static int move_to(const struct args *args, const struct cow *cow, const char *text, int lock,
		   enum sameness same, bool holes)
{
	struct base base = NO_BASE;
	char slot[SLOT_BYTES];
	int err;

	nbd_next_slot(cow->mangled, slot);
	err = open_base(text, slot, lock, &base);
	if (!err)
		err = move(args, cow, &base, same);
	close_base(&base);
	if (err) {
		nbd_release(slot);
		return err;
	}
	/*
	 * It has moved. An old connection that others use, too, stays, and the user is
	 * told; what cannot be renamed is found by the next rebase or remove.
	 */
	holes_stop(cow->mangled);
	nbd_release(cow->mangled);
	nbd_rename(slot, cow->mangled);
	if (holes && *cow->uuid)
		holes_start(cow->mangled, cow->uuid, text, base.bytes);
	return 0;
}

static int rebase_locked(const struct args *args, int lock, bool force, bool holes)
{
	const char *text = args->value[KEY_BASE];
	struct cow cow;

	return find_cow(args, &cow) ?: check_base(text) ?: settle(&cow) ?:
	       move_to(args, &cow, text, lock, force ? PROMISED : COMPARED, holes) ?:
	       reconnect_start(cow.mangled, holes);
}

/* To the server at @text, which its base is of, once more; with the lock of the name. */
int rebase_again(const struct cow *was, const char *text, int lock, bool holes)
{
	struct args args = { .name = was->name };
	struct cow cow;
	char *source;
	int err;

	memcpy(args.mangled, was->mangled, sizeof(args.mangled));
	err = find_cow(&args, &cow) ?: settle(&cow);
	if (err)
		return err;
	source = base_source(&cow);
	err = strcmp(cow.uuid, was->uuid) || strcmp(source, text) ? -ESTALE :
	      move_to(&args, &cow, text, lock, SAME_SERVER, holes);
	free(source);
	return err;
}

int cmd_rebase(const struct args *args)
{
	bool force, holes;
	int err, lock;

	err = need_base(args, "rebase") ?:
	      parse_flag(args, KEY_FORCE, false, &force) ?:
	      parse_flag(args, KEY_HOLES, true, &holes);
	if (err)
		return err;
	lock = lock_name(args);
	if (lock < 0)
		return lock;
	err = rebase_locked(args, lock, force, holes);
	close(lock);
	if (!err && args->json)
		err = report(args);
	return err;
}
