// SPDX-License-Identifier: GPL-2.0-only
/*
 * The commands: what a user asks for, in terms of the other layers. Those that
 * change something hold the lock of the name they change.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <linux/fs.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"

#define DEVICE_END	(UINT64_C(1) << 53)	/* NBDCOW_MAX_BLOCKS of the kernel */

/*
 * One command at a time for a name. The lock goes with its last descriptor, so
 * nothing of it has to be cleared away. From here on the signals that ask us to
 * stop are held back, see interrupted(); while it waits they end us.
 *
 * Return: the descriptor that holds the lock, or -errno; -EBUSY, in silence, when
 * it is taken and not to be waited for.
 */
int lock_slot(const char *slot, enum lock how)
{
	struct flock lock = {
		.l_type = how == LOCK_SHARE ? F_RDLCK : F_WRLCK, .l_len = 1,
	};
	uint64_t hash = UINT64_C(14695981039346656037);
	bool wait = how == LOCK_WAIT;
	sigset_t set;
	int fd, err;

	/* FNV-1a; two names of one hash merely wait for each other */
	for (const char *s = slot; *s; s++)
		hash = (hash ^ (unsigned char)*s) * UINT64_C(1099511628211);
	lock.l_start = hash >> 2;
	if (mkdir(RUN_DIR, 0755) && errno != EEXIST)
		return fail(-errno, "cannot make " RUN_DIR ": %m");
	fd = open(RUN_DIR "/lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	stop_signals(&set);
	if (wait)
		sigprocmask(SIG_UNBLOCK, &set, NULL);
	if (fd >= 0 && !fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &lock)) {
		sigprocmask(SIG_BLOCK, &set, NULL);
		return fd;
	}
	err = -errno;
	if (fd >= 0)
		close(fd);
	return fd >= 0 && !wait && (err == -EAGAIN || err == -EACCES) ? -EBUSY :
	       fail(err, "cannot lock " RUN_DIR "/lock: %s", strerror(-err));
}

int lock_name(const struct args *args)
{
	return lock_slot(args->mangled, LOCK_WAIT);
}

/* Who is going to write to a device has it alone, those who base copies on it share it. */
int lock_device(dev_t dev, enum lock how)
{
	char *slot = xasprintf("/dev/block/%u:%u", major(dev), minor(dev));
	int fd = lock_slot(slot, how);

	free(slot);
	return fd;
}

/* Return: whether block device @inner is @outer or one of its partitions. */
bool is_part_of(dev_t inner, dev_t outer)
{
	char *paths[2], *links[2];
	bool part;

	if (inner == outer)
		return true;
	links[0] = xasprintf("/sys/dev/block/%u:%u", major(inner), minor(inner));
	links[1] = xasprintf("/sys/dev/block/%u:%u", major(outer), minor(outer));
	for (int i = 0; i < 2; i++)
		paths[i] = realpath(links[i], NULL);
	part = paths[0] && paths[1] && !strncmp(paths[0], paths[1], strlen(paths[1])) &&
	       paths[0][strlen(paths[1])] == '/';
	for (int i = 0; i < 2; i++) {
		free(paths[i]);
		free(links[i]);
	}
	return part;
}

/* Return: where @dev or a partition of it is mounted (to be freed), or NULL. */
char *mounted_on(dev_t dev)
{
	FILE *mounts = fopen("/proc/self/mountinfo", "re");
	char *line = NULL, *where = NULL;
	unsigned int maj, min;
	size_t size = 0;

	while (mounts && !where && getline(&line, &size, mounts) > 0) {
		where = parse_mount(line, &maj, &min);
		if (where && !is_part_of(makedev(maj, min), dev)) {
			free(where);
			where = NULL;
		}
	}
	free(line);
	if (mounts)
		fclose(mounts);
	return where;
}

static bool count_holder(const char *name, dev_t dev, void *arg)
{
	struct holders *holders = arg;
	struct cow cow;
	int err = -ENOTBLK;

	if (!strncmp(name, "dm-", 3))
		err = dm_find_number(major(dev), minor(dev), &cow);
	if (!err && cow.state == COW_VIEW)
		holders->views++;
	else if (!err && cow.state != COW_FOREIGN)
		holders->copies++;
	else if (err != -ENODEV)	/* that one has gone meanwhile */
		holders->other = xasprintf("%s", name);
	return holders->other;
}

/* What stands on @dev; the name of something else than ours is to be freed. */
void find_holders(dev_t dev, struct holders *holders)
{
	memset(holders, 0, sizeof(*holders));
	any_link(dev, "holders", count_holder, holders);
}

/* A base must not change: refuse one that somebody may be writing to. */
static int check_unused(const char *base, dev_t dev)
{
	char *where = mounted_on(dev), *node;
	struct holders holders;
	int fd, err = 0;

	if (where) {
		err = fail(-EBUSY, "base %s is mounted on %s; unmount it first", base, where);
		free(where);
		return err;
	}
	find_holders(dev, &holders);
	if (holders.other) {
		err = fail(-EBUSY, "base %s is in use by %s", base, holders.other);
		free(holders.other);
		return err;
	}
	/* Copies share their base, each other user has it alone. */
	if (holders.copies || holders.views)
		return 0;
	node = xasprintf("/dev/block/%u:%u", major(dev), minor(dev));
	fd = open_alone(access(node, F_OK) ? base : node);
	free(node);
	if (fd >= 0) {
		close(fd);
		return 0;
	}
	if (fd != -EBUSY)
		return fail(fd, "cannot open base %s: %s", base, strerror(-fd));
	/* Or a copy was just made. */
	find_holders(dev, &holders);
	free(holders.other);
	return holders.copies ? 0 :
	       fail(fd, "base %s is in use, by swap, RAID or another program", base);
}

/* What can be found wrong with base= before anything is done about it. */
int check_base(const char *text)
{
	struct stat st;

	if (strstr(text, "://"))
		return 0;
	if (stat(text, &st))
		return fail(-errno, "cannot find base %s: %m", text);
	if (S_ISBLK(st.st_mode))
		return check_unused(text, st.st_rdev);
	if (!S_ISREG(st.st_mode))
		return fail(-ENOTBLK, "base %s is no block device, image file or nbd:// address",
			    text);
	if (st.st_size < SECTOR_BYTES)
		return fail(-EIO, "base %s has %lld bytes; a device has at least %d", text,
			    (long long)st.st_size, SECTOR_BYTES);
	if (st.st_size % SECTOR_BYTES)
		warn("base %s: the last %lld bytes are left out, for they fill no sector",
		     text, (long long)st.st_size % SECTOR_BYTES);
	return 0;
}

/*
 * Opens the base, through a loop device or an NBD connection where it takes one;
 * the connection is remembered as @slot's.
 */
int open_base(const char *text, const char *slot, int lock_fd, struct base *base)
{
	char dev[PATH_MAX];
	struct stat st;

	base->text = text;
	if (strstr(text, "://")) {
		base->fd = nbd_connect(slot, text, lock_fd, dev);
	} else if (!stat(text, &st) && S_ISREG(st.st_mode)) {
		base->fd = loop_attach(text, dev);
	} else {
		base->fd = open(text, O_RDONLY | O_CLOEXEC);
		if (base->fd < 0)
			return fail(-errno, "cannot open base %s: %m", text);
	}
	if (base->fd < 0)
		return base->fd;
	if (fstat(base->fd, &st) || ioctl(base->fd, BLKGETSIZE64, &base->bytes))
		return fail(-errno, "cannot get the size of base %s: %m", text);
	base->dev = st.st_rdev;
	base->lock = lock_device(base->dev, LOCK_SHARE);
	if (base->lock == -EBUSY)
		return fail(-EBUSY, "base %s is just being changed by \"cowctl commit\"", text);
	if (base->lock < 0)
		return base->lock;
	if (!base->bytes)
		return fail(-EIO, "base %s is empty", text);
	return 0;
}

/* A mapped device keeps it from here on. */
void close_base(struct base *base)
{
	if (base->fd >= 0)
		close(base->fd);
	if (base->lock >= 0)
		close(base->lock);
	base->fd = -1;
	base->lock = -1;
}

/* Return: 0 when base= is given, which @command needs, and is no address we cannot use. */
int need_base(const struct args *args, const char *command)
{
	const char *text = args->value[KEY_BASE];
	struct nbd_uri uri;

	if (text)
		return strstr(text, "://") ? nbd_check(text, &uri) : 0;
	if (args->named && !access(args->name, F_OK))
		return fail(-EINVAL, "%s: base= is missing; did you mean base=%s?", command,
			    args->name);
	return fail(-EINVAL, "%s: base= is missing; see \"cowctl help %s\"", command, command);
}

/* A key that takes a size, a part of the RAM or none; none where it is not given. */
int parse_blocks(const struct args *args, enum key key, uint64_t *blocks)
{
	const char *text = args->value[key] ?: "none";
	struct sysinfo info;

	sysinfo(&info);
	switch (-parse_limit(text, (uint64_t)info.totalram * info.mem_unit, blocks)) {
	case 0:
		return 0;
	case ERANGE:
		return fail(-EINVAL, "%s=%s is out of range: from %d bytes to less than %s",
			    key_name(key), text, BLOCK_BYTES, "16 EiB, or 1% to 100%");
	default:
		return fail(-EINVAL, "%s=%s is no size (4G), percentage (25%%) or none",
			    key_name(key), text);
	}
}

/* A key that takes true or false; @fallback where it is not given. */
int parse_flag(const struct args *args, enum key key, bool fallback, bool *flag)
{
	const char *text = args->value[key] ?: fallback ? "true" : "false";

	*flag = !strcmp(text, "true");
	return *flag || !strcmp(text, "false") ? 0 :
	       fail(-EINVAL, "%s=%s is neither true nor false", key_name(key), text);
}

/* A size that a device may have; 0 where it is not given. */
int parse_bytes(const struct args *args, enum key key, uint64_t *bytes)
{
	const char *text = args->value[key];
	int err;

	*bytes = 0;
	if (!text)
		return 0;
	err = parse_size(text, bytes);
	if (err == -ERANGE || (!err && (!*bytes || *bytes >= DEVICE_END)))
		return fail(-EINVAL, "%s=%s is out of range: from 1 byte to less than 8 PiB",
			    key_name(key), text);
	if (err)
		return fail(-EINVAL, "%s=%s is no size (20G, 512M)", key_name(key), text);
	return 0;
}

/* A number from 1 on; 0 where it is not given. */
int parse_number(const struct args *args, enum key key, uint64_t *number)
{
	const char *text = args->value[key];

	*number = 0;
	if (!text || (!parse_size(text, number) && *number && *number <= UINT32_MAX &&
		      strspn(text, "0123456789") == strlen(text)))
		return 0;
	return fail(-EINVAL, "%s=%s is no number from 1 to %u", key_name(key), text,
		    UINT32_MAX);
}

/* Seconds; @ms stays as it is where they are not given. */
int parse_time(const struct args *args, enum key key, uint64_t least_ms, uint64_t *ms)
{
	const char *text = args->value[key];
	int err = text ? parse_seconds(text, ms) : 0;

	if (err == -ERANGE || (!err && text && *ms < least_ms))
		return fail(-EINVAL, "%s=%s is out of range: from %g seconds to a year",
			    key_name(key), text, least_ms / 1000.0);
	return err ? fail(-EINVAL, "%s=%s is no number of seconds, with at most 3 decimals (0.5)",
			  key_name(key), text) : 0;
}

/* true, false, or a path that switches it; @path is NULL without one. */
static int parse_cow_on_read(const struct args *args, bool *on, const char **path)
{
	const char *text = args->value[KEY_COW_ON_READ] ?: "false";

	*path = *text == '/' ? text : NULL;
	*on = !strcmp(text, "true");
	if (*path && (strlen(text) >= PATH_MAX || !printable(text)))
		return fail(-EINVAL, "cow-on-read=%s: the path is too long or cannot be printed",
			    text);
	return *path || *on || !strcmp(text, "false") ? 0 :
	       fail(-EINVAL, "cow-on-read=%s is neither true, false nor an absolute path", text);
}

static int parse_on_base_error(const struct args *args, bool *queue)
{
	const char *text = args->value[KEY_ON_BASE_ERROR] ?: "error";

	*queue = !strcmp(text, "queue");
	return *queue || !strcmp(text, "error") ? 0 :
	       fail(-EINVAL, "on-base-error=%s is neither error nor queue", text);
}

/*
 * What a table line says of features, but for tmpfs. @watched: the file that switches
 * cow-on-read, or NULL.
 */
int parse_features(const struct args *args, struct cow_table *table, const char **watched)
{
	return parse_blocks(args, KEY_LIMIT, &table->limit_blocks) ?:
	       parse_cow_on_read(args, &table->cow_on_read, watched) ?:
	       parse_flag(args, KEY_COW_ON_CACHE, false, &table->cow_on_cache) ?:
	       parse_blocks(args, KEY_CACHE_LIMIT, &table->cache_limit_blocks) ?:
	       parse_on_base_error(args, &table->queue_errors);
}

/* What a new device shall be like. */
struct shape {
	struct cow_table table;		/* but for the base */
	uint64_t bytes;			/* 0: that of the base */
	const char *watched;		/* switches cow-on-read, or NULL */
	bool round_up;
	bool holes;
	bool partitions;
};

static int parse_shape(const struct args *args, struct shape *shape)
{
	const char *round = args->value[KEY_ROUND];

	if (round && strcmp(round, "up") && strcmp(round, "down"))
		return fail(-EINVAL, "round=%s is neither up nor down", round);
	shape->round_up = round && !strcmp(round, "up");
	return parse_features(args, &shape->table, &shape->watched) ?:
	       parse_bytes(args, KEY_SIZE, &shape->bytes) ?:
	       parse_flag(args, KEY_HOLES, true, &shape->holes) ?:
	       parse_flag(args, KEY_PARTITIONS, false, &shape->partitions);
}

static int make_device(const struct args *args, const struct shape *shape,
		       const struct base *base)
{
	uint64_t bytes = shape->bytes ? shape->bytes : base->bytes;
	struct cow_table table = shape->table;
	char line[4 * PATH_MAX];
	int err;

	if (shape->round_up)
		bytes += BLOCK_BYTES - 1;
	else if (!shape->bytes && bytes >= BLOCK_BYTES && bytes % BLOCK_BYTES &&
		 !args->value[KEY_ROUND])
		warn("the last %d bytes of the base are left out; round=up keeps them",
		     (int)(bytes % BLOCK_BYTES));
	bytes -= bytes % BLOCK_BYTES;
	if (!bytes)
		return fail(-EINVAL, "%s would have no block of %d bytes; say round=up",
			    args->name, BLOCK_BYTES);
	table.major = major(base->dev);
	table.minor = minor(base->dev);
	tmpfs_from_environment(table.tmpfs);
	err = format_table(&table, line, sizeof(line));
	if (err)
		return fail(err, "the path of TMPDIR is too long");
	return dm_create(args, bytes / SECTOR_BYTES, line);
}

/* What works for a device beside it, and the partitions. */
static int add_services(const struct args *args, const struct shape *shape,
			const struct base *base)
{
	bool nbd = strstr(base->text, "://"), holes = shape->holes && nbd;
	bool reconnect = nbd && shape->table.queue_errors;
	struct cow cow;
	int err;

	if (!shape->watched && !shape->partitions && !holes && !reconnect)
		return 0;
	err = dm_find(args->mangled, &cow);
	if (!err && shape->watched)
		err = watch_start(&cow, shape->watched);
	if (!err && reconnect)
		err = reconnect_start(cow.mangled, holes);
	if (!err && shape->partitions)
		err = parts_map(cow.path, false);
	if (!err && holes)
		holes_start(cow.mangled, cow.uuid, base->text, base->bytes);
	return err;
}

static void stop_helpers(const char *mangled)
{
	holes_stop(mangled);
	watch_stop(mangled);
	reconnect_stop(mangled);
}

/* Takes the device away, and then what worked for it. */
static int take_down(const struct args *args, const struct cow *cow)
{
	int n = parts_find(cow, NULL), err = 0;

	if (n)
		err = parts_unmap(cow->path);
	if (!err)
		err = dm_remove(args);
	if (err) {
		if (n)
			parts_map(cow->path, true);
		return err;
	}
	stop_helpers(args->mangled);
	return 0;
}

/* Ends the NBD connections of this name, also one that a killed rebase has left. */
static int release_base(const char *mangled)
{
	char slot[SLOT_BYTES];

	nbd_next_slot(mangled, slot);
	return nbd_release(slot) ?: nbd_release(mangled);
}

/* Return: 0 when the name is free, after clearing away what a killed create left. */
static int check_free(const struct args *args)
{
	struct export export;
	struct cow cow;
	int err = dm_find(args->mangled, &cow);

	if (!err && cow.state != COW_HALF_MADE)
		return fail(-EEXIST, cow.state == COW_LIVE ?
			    "%s exists already; remove it first or choose another name" :
			    "%s exists already, as another kind of mapped device", args->name);
	if (!err)
		err = dm_remove(args);
	else if (err == -ENODEV)
		err = 0;
	if (!err && !export_find(args->mangled, &export))
		err = fail(-EBUSY, "an earlier %s is still exported; \"cowctl unexport\" it first",
			   args->name);
	if (err)
		return err;
	stop_helpers(args->mangled);
	return release_base(args->mangled);
}

/* The name of a block device under /dev. */
char *device_path(unsigned int maj, unsigned int min)
{
	char *link = xasprintf("/sys/dev/block/%u:%u", maj, min), *path;
	char *file = xasprintf("%s/dm/name", link), name[NAME_BYTES];
	char *real = realpath(link, NULL);
	int err = read_line(file, name, sizeof(name));

	if (!err)
		path = xasprintf("/dev/mapper/%s", name);
	else
		path = real ? xasprintf("/dev/%s", strrchr(real, '/') + 1) :
		       xasprintf("%u:%u", maj, min);
	/* as the kernel writes the names of devices in directories */
	for (char *s = path; real && err && *s; s++)
		if (*s == '!')
			*s = '/';
	free(real);
	free(file);
	free(link);
	return path;
}

/*
 * The image file or address that the base's device is for, or else the device: a loop
 * device that begins or ends elsewhere than its file has another content than that.
 */
char *base_source(const struct cow *cow)
{
	char *file = xasprintf("/sys/dev/block/%u:%u/loop/backing_file", cow->table.major,
			       cow->table.minor);
	char *dev = device_path(cow->table.major, cow->table.minor), text[PATH_MAX];
	struct nbd_link link;
	char *source;

	if (!read_line(file, text, sizeof(text)) && printable(text) &&
	    !loop_is_part(makedev(cow->table.major, cow->table.minor)))
		source = xasprintf("%s", text);
	else if (!nbd_find(cow->mangled, &link) && link.connected && !strcmp(link.dev, dev) &&
		 printable(link.uri))
		source = xasprintf("%s", link.uri);
	else
		source = xasprintf("%s", dev);
	free(dev);
	free(file);
	return source;
}

static void add_text(struct json_object *object, const char *key, char *text)
{
	json_object_object_add(object, key, text ? json_object_new_string(text) : NULL);
	free(text);
}

static void add_number(struct json_object *object, const char *key, uint64_t number)
{
	json_object_object_add(object, key, json_object_new_uint64(number));
}

static void add_flag(struct json_object *object, const char *key, bool flag)
{
	json_object_object_add(object, key, json_object_new_boolean(flag));
}

static void add_limit(struct json_object *object, const char *key, uint64_t blocks)
{
	if (blocks == NO_LIMIT)
		json_object_object_add(object, key, NULL);
	else
		add_number(object, key, blocks * BLOCK_BYTES);
}

static struct json_object *describe_prefetch(const struct cow_status *status)
{
	struct json_object *object;

	if (!status->prefetch[0])
		return NULL;
	object = json_object_new_object();
	add_text(object, "state", xasprintf("%s", status->prefetch));
	add_number(object, "done", status->prefetch_done * BLOCK_BYTES);
	add_number(object, "total", status->prefetch_total * BLOCK_BYTES);
	return object;
}

/* What comes from where, and what does not come at all. */
static void add_cache(struct json_object *object, const struct cow *cow)
{
	const struct cow_status *status = &cow->status;
	char path[PATH_MAX];

	if (!watch_find(cow->mangled, path))
		add_text(object, "cow_on_read", xasprintf("%s", path));
	else
		add_flag(object, "cow_on_read", cow->table.cow_on_read);
	add_flag(object, "cow_on_cache", cow->table.cow_on_cache);
	add_number(object, "cached", status->cached_blocks * BLOCK_BYTES);
	add_limit(object, "cache_limit", status->cache_limit_blocks);
	add_number(object, "evicted", status->evicted_blocks * BLOCK_BYTES);
	add_number(object, "hits", status->hit_sectors * SECTOR_BYTES);
	add_number(object, "misses", status->missed_sectors * SECTOR_BYTES);
	add_number(object, "overlay_reads", status->overlay_sectors * SECTOR_BYTES);
	add_number(object, "base_reads", status->base_sectors * SECTOR_BYTES);
	json_object_object_add(object, "prefetch", describe_prefetch(status));
	add_text(object, "on_base_error",
		 xasprintf("%s", cow->table.queue_errors ? "queue" : "error"));
	add_flag(object, "reconnects", reconnect_runs(cow->mangled));
	add_number(object, "queued", status->queued);
}

static int by_minor(const void *a, const void *b)
{
	const struct part *const first = a, *const second = b;

	return (first->minor > second->minor) - (first->minor < second->minor);
}

static struct json_object *describe_parts(const struct cow *cow)
{
	struct json_object *list = json_object_new_array();
	struct part *parts;
	int n = parts_find(cow, &parts);

	if (n)
		qsort(parts, n, sizeof(*parts), by_minor);
	for (int i = 0; i < n; i++) {
		char *path = device_path(parts[i].major, parts[i].minor);

		json_object_array_add(list, json_object_new_string(path));
		free(path);
	}
	free(parts);
	return list;
}

/* What others made may have a path that cannot be printed; it is as in the table then. */
static char *tmpfs_text(const struct cow_table *table)
{
	char encoded[3 * PATH_MAX];

	if (!table->tmpfs[0])
		return NULL;
	if (printable(table->tmpfs))
		return xasprintf("%s", table->tmpfs);
	percent_encode(table->tmpfs, encoded, sizeof(encoded));
	return xasprintf("%s", encoded);
}

/* A device as JSON, the same wherever one is reported; sizes are in bytes. */
struct json_object *describe(const struct cow *cow)
{
	const struct cow_status *status = &cow->status;
	struct json_object *object = json_object_new_object(), *served = NULL;
	struct export export;

	add_text(object, "name", xasprintf("%s", cow->name));
	add_text(object, "path", xasprintf("%s", cow->path));
	add_number(object, "size", cow->sectors * SECTOR_BYTES);
	add_text(object, "base", base_source(cow));
	add_text(object, "base_device", device_path(cow->table.major, cow->table.minor));
	add_number(object, "base_size",
		   device_bytes(makedev(cow->table.major, cow->table.minor)));
	add_number(object, "base_size_expected", status->base_size_sectors * SECTOR_BYTES);
	add_text(object, "tmpfs", tmpfs_text(&cow->table));
	add_text(object, "health", xasprintf("%s", status->health));
	add_number(object, "used", status->used_blocks * BLOCK_BYTES);
	add_limit(object, "limit", status->limit_blocks);
	add_number(object, "peak", status->peak_blocks * BLOCK_BYTES);
	add_number(object, "zeroed", status->zeroed_blocks * BLOCK_BYTES);
	add_number(object, "metadata", status->metadata_bytes);
	add_number(object, "writes_refused", status->writes_refused);
	add_number(object, "base_errors", status->base_errors);
	add_cache(object, cow);
	add_number(object, "open_count", cow->open_count);
	json_object_object_add(object, "partitions", describe_parts(cow));
	if (!export_find(cow->mangled, &export)) {
		served = json_object_new_object();
		add_text(served, "server", xasprintf("%s", export.server));
		add_text(served, "uri", xasprintf("%s", export.uri));
	}
	json_object_object_add(object, "export", served);
	return object;
}

void print_json(struct json_object *object)
{
	puts(json_object_to_json_string_ext(object, JSON_C_TO_STRING_PRETTY |
					    JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(object);
}

/* Prints the device: all of it as JSON, else its path. */
int report(const struct args *args)
{
	struct cow cow;
	int err = find_cow(args, &cow);

	if (err)
		return err;
	if (args->json)
		print_json(describe(&cow));
	else
		puts(cow.path);
	return 0;
}

static int create_on(const struct args *args, const struct shape *shape, struct base *base)
{
	int err = interrupted() ? -EINTR : make_device(args, shape, base);
	struct cow cow;

	close_base(base);
	if (err)
		return err;
	err = add_services(args, shape, base);
	if (!err && interrupted())
		err = -EINTR;
	if (err && !dm_find(args->mangled, &cow) && take_down(args, &cow))
		err = -EBUSY;
	return err;
}

int cmd_create(const struct args *args)
{
	struct base base = NO_BASE;
	struct shape shape;
	int lock, err;

	err = need_base(args, "create") ?: parse_shape(args, &shape);
	if (err)
		return err;
	lock = lock_name(args);
	if (lock < 0)
		return lock;
	err = dm_need_target();
	if (!err)
		err = check_free(args);
	if (!err)
		err = check_base(args->value[KEY_BASE]);
	if (err)
		goto out;
	err = open_base(args->value[KEY_BASE], args->mangled, lock, &base);
	if (!err)
		err = create_on(args, &shape, &base);
	close_base(&base);
	if (err)
		nbd_release(args->mangled);
	else
		err = report(args);
out:
	close(lock);
	return err;
}

/* Return: 0 and the live device of ours that is meant, or -errno. */
int find_cow(const struct args *args, struct cow *cow)
{
	int err = dm_find(args->mangled, cow);

	if (err == -ENODEV)
		return fail(err, "there is no device %s; \"cowctl list\" shows those there are",
			    args->name);
	if (err)
		return err;
	if (cow->state == COW_HALF_MADE)
		return fail(-ENODEV, "%s is only half made; remove it or create it again",
			    args->name);
	if (cow->state != COW_LIVE)
		return fail(-ENODEV, "%s is another kind of mapped device", args->name);
	return 0;
}

/* Says who has the device open; its partitions are not meant. */
int fail_busy(const struct args *args, const struct cow *cow, const char *hint)
{
	dev_t dev = makedev(cow->major, cow->minor);
	struct holders holders = { 0 };
	char *where = mounted_on(dev);
	int n = parts_find(cow, NULL);

	if (where)
		fail(-EBUSY, "%s is mounted on %s; unmount it first%s", args->name, where, hint);
	else if (!n)
		find_holders(dev, &holders);
	if (holders.other)
		fail(-EBUSY, "%s is in use by %s%s", args->name, holders.other, hint);
	else if (holders.copies)
		fail(-EBUSY, "%s is the base of another copy%s", args->name, hint);
	else if (!where)
		fail(-EBUSY, "%s is open in %d place(s); \"fuser -v %s\" shows them%s", args->name,
		     cow->open_count - n, cow->path, hint);
	free(where);
	free(holders.other);
	return -EBUSY;
}

/* Is it open in more than @n places? For a moment udev has it, after whoever wrote to it. */
static bool stays_open(unsigned int major, unsigned int minor, int n, struct cow *now)
{
	int64_t deadline = now_ms() + BUSY_MS;

	while (!dm_find_number(major, minor, now) && now->open_count > n) {
		if (now_ms() >= deadline)
			return true;
		poll(NULL, 0, BUSY_PROBE_MS);
	}
	return false;
}

/* Return: how many partitions have devices, when nobody has one of these open. */
int check_parts_closed(const struct cow *cow, const char *hint)
{
	struct part *parts;
	int n = parts_find(cow, &parts), err = 0;

	for (int i = 0; i < n && !err; i++) {
		struct args part_args = { 0 };
		struct cow part;

		if (!stays_open(parts[i].major, parts[i].minor, 0, &part))
			continue;
		part_args.name = part.name;
		err = fail_busy(&part_args, &part, hint);
	}
	free(parts);
	return err ?: n;
}

/* Return: 0 when nobody has the device open, except as unused partitions of it. */
int check_closed(const struct args *args, const struct cow *cow, const char *hint)
{
	int n = check_parts_closed(cow, hint);
	struct cow now;

	return n < 0 ? n : cow->open_count > n && stays_open(cow->major, cow->minor, n, &now) ?
	       fail_busy(args, &now, hint) : 0;
}

static int remove_locked(const struct args *args)
{
	struct export export;
	struct nbd_link link;
	struct cow cow;
	int err = dm_find(args->mangled, &cow);

	/* Without a device there may still be the end of an earlier remove to do. */
	if (err == -ENODEV && !nbd_find(args->mangled, &link))
		return release_base(args->mangled);
	if (err == -ENODEV || (!err && cow.state != COW_HALF_MADE))
		err = find_cow(args, &cow);
	if (err)
		return err;
	if (!export_find(args->mangled, &export))
		return fail(-EBUSY, "%s is exported at %s; \"cowctl unexport\" it first",
			    args->name, export.uri);
	err = check_closed(args, &cow, "") ?: take_down(args, &cow);
	if (err)
		return err;
	export_forget(args->mangled);
	return release_base(args->mangled);
}

int cmd_remove(const struct args *args)
{
	int lock = lock_name(args), err;

	if (lock < 0)
		return lock;
	err = remove_locked(args);
	close(lock);
	return err;
}

static int add_described(const struct cow *cow, void *list)
{
	json_object_array_add(list, describe(cow));
	return 0;
}

static uint64_t number(struct json_object *object, const char *key)
{
	return json_object_get_uint64(json_object_object_get(object, key));
}

static const char *text(struct json_object *object, const char *key)
{
	struct json_object *value = json_object_object_get(object, key);

	return value ? json_object_get_string(value) : "-";
}

/* "12.0 MiB" or, where there is a limit, "12.0 MiB (3%)". */
static char *used_text(struct json_object *device)
{
	uint64_t used = number(device, "used"), limit = number(device, "limit");
	char size[16];

	human_size(used, size);
	if (!json_object_object_get(device, "limit"))
		return xasprintf("%s", size);
	return xasprintf("%s (%.0f%%)", size, limit ? 100.0 * used / limit : 100.0);
}

static char *limit_text(struct json_object *device)
{
	char size[16];

	return xasprintf("%s", json_object_object_get(device, "limit") ?
			 human_size(number(device, "limit"), size) : "none");
}

#define COLUMNS 8

/* A row of cells, the last of which needs no padding; owned by the table. */
static void fill_row(char **cells, struct json_object *device)
{
	struct json_object *served = json_object_object_get(device, "export");
	char size[16];

	cells[0] = xasprintf("%s", text(device, "name"));
	cells[1] = xasprintf("%s", human_size(number(device, "size"), size));
	cells[2] = used_text(device);
	cells[3] = limit_text(device);
	cells[4] = xasprintf("%s", human_size(number(device, "cached"), size));
	cells[5] = xasprintf("%s", text(device, "health"));
	cells[6] = xasprintf("%s", text(device, "base"));
	cells[7] = xasprintf("%s", served ? text(served, "uri") : "-");
}

/* Bytes that begin a character; close enough to its width on a terminal. */
static int width(const char *cell)
{
	int n = 0;

	for (; *cell; cell++)
		n += (*cell & 0xc0) != 0x80;
	return n;
}

static void print_table(struct json_object *list)
{
	static const char *const heads[COLUMNS] = {
		"NAME", "SIZE", "USED", "LIMIT", "CACHED", "HEALTH", "BASE", "EXPORT",
	};
	size_t rows = json_object_array_length(list) + 1;
	char **cells = calloc(rows * COLUMNS, sizeof(*cells));
	int widths[COLUMNS] = { 0 };

	if (!cells)
		return;
	for (int c = 0; c < COLUMNS; c++)
		cells[c] = xasprintf("%s", heads[c]);
	for (size_t r = 1; r < rows; r++)
		fill_row(cells + r * COLUMNS, json_object_array_get_idx(list, r - 1));
	for (size_t i = 0; i < rows * COLUMNS; i++)
		if (width(cells[i]) > widths[i % COLUMNS])
			widths[i % COLUMNS] = width(cells[i]);
	for (size_t i = 0; i < rows * COLUMNS; i++) {
		int c = i % COLUMNS;

		if (c == COLUMNS - 1)
			puts(cells[i]);
		else
			printf("%s%*s", cells[i], widths[c] - width(cells[i]) + 2, "");
		free(cells[i]);
	}
	free(cells);
}

int cmd_list(const struct args *args)
{
	struct json_object *list = json_object_new_array();
	int err = dm_each(add_described, list);

	if (err || !args->json) {
		if (!err)
			print_table(list);
		json_object_put(list);
		return err;
	}
	print_json(list);
	return 0;
}

static void print_line(const char *title, char *value)
{
	printf("  %-17s %s\n", title, value);
	free(value);
}

static void print_sizes(struct json_object *device, const char *const (*lines)[2])
{
	char size[16];

	for (; (*lines)[0]; lines++)
		print_line((*lines)[0], xasprintf("%s", human_size(number(device, (*lines)[1]),
								   size)));
}

static void print_numbers(struct json_object *device, const char *const (*lines)[2])
{
	for (; (*lines)[0]; lines++)
		print_line((*lines)[0], xasprintf("%" PRIu64, number(device, (*lines)[1])));
}

/* The health, and what is known about a base that is not well. */
static char *health_text(struct json_object *device)
{
	uint64_t now = number(device, "base_size"), expected = number(device, "base_size_expected");
	const char *health = text(device, "health");

	if (strcmp(health, "base-error"))
		return xasprintf("%s", health);
	if (!now)
		return xasprintf("%s: the base is away", health);
	if (now < expected)
		return xasprintf("%s: the base has shrunk from %" PRIu64 " to %" PRIu64 " bytes",
				 health, expected, now);
	return xasprintf("%s: the base cannot be read", health);
}

static void print_cache(struct json_object *device)
{
	static const char *const reads[][2] = {
		{ "evicted", "evicted" },
		{ "read from overlay", "overlay_reads" },
		{ "read from cache", "hits" },
		{ "read into cache", "misses" },
		{ "read past cache", "base_reads" },
		{ NULL, NULL }
	};
	struct json_object *prefetch = json_object_object_get(device, "prefetch");
	char size[16], more[16];

	human_size(number(device, "cached"), size);
	if (json_object_object_get(device, "cache_limit"))
		print_line("cache", xasprintf("%s of at most %s", size,
					      human_size(number(device, "cache_limit"), more)));
	else
		print_line("cache", xasprintf("%s", size));
	print_line("cow-on-read", xasprintf("%s", text(device, "cow_on_read")));
	print_line("cow-on-cache", xasprintf("%s", text(device, "cow_on_cache")));
	print_sizes(device, reads);
	if (prefetch)
		print_line("prefetch", xasprintf("%s, %s of %s", text(prefetch, "state"),
						 human_size(number(prefetch, "done"), size),
						 human_size(number(prefetch, "total"), more)));
}

static void print_partitions(struct json_object *device)
{
	struct json_object *parts = json_object_object_get(device, "partitions");

	for (size_t i = 0; i < json_object_array_length(parts); i++)
		print_line("partition",
			   xasprintf("%s", json_object_get_string(json_object_array_get_idx(parts,
											    i))));
}

static void print_status(struct json_object *device)
{
	struct json_object *served = json_object_object_get(device, "export");
	static const char *const sizes[][2] = {
		{ "peak", "peak" }, { "zeroed", "zeroed" }, { "metadata", "metadata" },
		{ NULL, NULL }
	};
	static const char *const counters[][2] = {
		{ "writes refused", "writes_refused" },
		{ "base read errors", "base_errors" },
		{ "requests waiting", "queued" },
		{ "open", "open_count" },
		{ NULL, NULL }
	};
	bool reconnects = json_object_get_boolean(json_object_object_get(device, "reconnects"));
	char size[16];

	printf("%s\n", text(device, "path"));
	print_line("size", xasprintf("%s", human_size(number(device, "size"), size)));
	print_line("base", xasprintf("%s", text(device, "base")));
	if (strcmp(text(device, "base"), text(device, "base_device")))
		print_line("base device", xasprintf("%s", text(device, "base_device")));
	print_line("on base error", xasprintf("%s%s", text(device, "on_base_error"), reconnects ?
					      ", and connects anew" : ""));
	print_line("health", health_text(device));
	print_line("used", used_text(device));
	print_line("limit", limit_text(device));
	print_sizes(device, sizes);
	if (json_object_object_get(device, "tmpfs"))
		print_line("tmpfs", xasprintf("%s", text(device, "tmpfs")));
	print_cache(device);
	print_numbers(device, counters);
	print_partitions(device);
	if (served)
		print_line("export", xasprintf("%s by %s", text(served, "uri"),
					       text(served, "server")));
}

/* All of them, unless one is named. */
static int show_metrics(const struct args *args)
{
	struct json_object *list = json_object_new_array();
	struct cow cow;
	int err;

	if (args->json)
		err = fail(-EINVAL, "--json and --prometheus exclude each other");
	else if (args->named)
		err = find_cow(args, &cow) ?: add_described(&cow, list);
	else
		err = dm_each(add_described, list);
	if (!err)
		print_prometheus(list);
	json_object_put(list);
	return err;
}

int cmd_status(const struct args *args)
{
	struct json_object *device;
	struct cow cow;
	int err;

	if (args->watch)
		return args->prometheus ?
		       fail(-EINVAL, "--watch and --prometheus exclude each other") : cmd_top(args);
	for (enum key key = KEY_SORT; key <= KEY_LOOKS; key++)
		if (args->value[key])
			return fail(-EINVAL, "status: %s= needs --watch", key_name(key));
	if (args->prometheus)
		return show_metrics(args);
	err = find_cow(args, &cow);
	if (err)
		return err;
	device = describe(&cow);
	if (args->json) {
		print_json(device);
	} else {
		print_status(device);
		json_object_put(device);
	}
	return 0;
}

#define RESET_HINT	", or say force=true"
#define FLUSH_MS	30000

struct flush {
	const struct cow *cow;
	int fd;
	int lock;
};

static int flush_part(const struct part *found)
{
	struct cow part;
	int fd, err;

	if (dm_find_number(found->major, found->minor, &part))
		return 0;
	fd = open(part.path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	err = ioctl(fd, BLKFLSBUF) ? -errno : 0;
	close(fd);
	return err;
}

static int flush(void *arg)
{
	const struct flush *flush = arg;
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), n, err = 0;
	struct part *parts;

	close(flush->lock);
	/* It may hang, and nobody is to wait for the end of what we print. */
	for (int fd = 0; fd <= 2; fd++)
		dup2(null, fd);
	n = parts_find(flush->cow, &parts);
	for (int i = 0; i < n && !err; i++)
		err = flush_part(&parts[i]);
	return err ?: ioctl(flush->fd, BLKFLSBUF) ? -errno : 0;
}

/*
 * Writes what is dirty in the page caches and empties them, in a process of its own that does
 * not hold the lock: it may wait for the base, and who brings that back for the lock.
 */
static int flush_apart(const struct cow *cow, int fd, int lock)
{
	struct flush arg = { .cow = cow, .fd = fd, .lock = lock };
	int err = call_apart(flush, &arg, cow->table.queue_errors ? FLUSH_MS : -1, true);

	if (err == -ETIMEDOUT)
		return fail(-EBUSY, "what is to be written to %s waits for the base; %s",
			    cow->name, "rebase it, or set on-base-error=error first");
	return err ? fail(err, "cannot empty the page cache of %s: %s", cow->path,
			  strerror(-err)) : 0;
}

/*
 * The page cache is emptied before the reset, or what is dirty in it would be
 * written to the fresh overlay, and after it, or its readers would see old data.
 */
static int reset_device(const struct args *args, const struct cow *cow, int lock, bool force)
{
	int fd = open(cow->path, O_RDONLY | O_CLOEXEC | (force ? 0 : O_EXCL)), err;

	if (fd < 0)
		return errno == EBUSY ? fail_busy(args, cow, RESET_HINT) :
		       fail(-errno, "cannot open %s: %m", cow->path);
	err = flush_apart(cow, fd, lock) ?: dm_message(args, "reset") ?:
	      flush_apart(cow, fd, lock);
	close(fd);
	return err;
}

/* Partitions that nobody uses are taken away meanwhile, and looked for again. */
static int reset_locked(const struct args *args, int lock, bool force)
{
	struct cow cow;
	int err = find_cow(args, &cow), n;

	if (!err && !force)
		err = check_closed(args, &cow, RESET_HINT);
	if (err)
		return err;
	n = parts_find(&cow, NULL);
	if (n && !force)
		err = parts_unmap(cow.path);
	if (!err)
		err = reset_device(args, &cow, lock, force);
	return n ? parts_renew(&cow, "reset", err) : err;
}

int cmd_reset(const struct args *args)
{
	bool force;
	int err = parse_flag(args, KEY_FORCE, false, &force), lock;

	if (err)
		return err;
	lock = lock_name(args);
	if (lock < 0)
		return lock;
	err = reset_locked(args, lock, force);
	close(lock);
	return err;
}

/* Prints where it is served, and by what. */
void report_server(const struct args *args, const char *server, const char *uri)
{
	struct json_object *object;

	if (!args->json) {
		puts(uri);
		return;
	}
	object = json_object_new_object();
	add_text(object, "name", xasprintf("%s", args->name));
	add_text(object, "server", xasprintf("%s", server));
	add_text(object, "uri", xasprintf("%s", uri));
	print_json(object);
}

int cmd_export(const struct args *args)
{
	int lock = lock_name(args), err;
	struct export export;
	struct cow cow;

	if (lock < 0)
		return lock;
	err = find_cow(args, &cow);
	if (!err)
		err = export_start(&cow, args);
	if (!err && export_find(args->mangled, &export))
		err = fail(-EIO, "the server of %s has ended again", args->name);
	if (!err)
		report_server(args, export.server, export.uri);
	close(lock);
	return err;
}

int cmd_unexport(const struct args *args)
{
	int lock = lock_name(args), err;

	if (lock < 0)
		return lock;
	err = export_stop(args->mangled, args->name);
	close(lock);
	return err;
}
