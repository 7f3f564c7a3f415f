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
#include <linux/magic.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "cowctl.h"

/*
 * One command at a time for a name. The lock goes with its last descriptor, so
 * nothing of it has to be cleared away. From here on the signals that ask us to
 * stop are held back, see interrupted().
 *
 * Return: the descriptor that holds the lock, or -errno.
 */
static int lock_name(const struct args *args)
{
	struct flock lock = { .l_type = F_WRLCK, .l_len = 1 };
	uint64_t hash = UINT64_C(14695981039346656037);
	sigset_t set;
	int fd;

	/* FNV-1a; two names of one hash merely wait for each other */
	for (const char *s = args->mangled; *s; s++)
		hash = (hash ^ (unsigned char)*s) * UINT64_C(1099511628211);
	lock.l_start = hash >> 2;
	if (mkdir(RUN_DIR, 0755) && errno != EEXIST)
		return fail(-errno, "cannot make " RUN_DIR ": %m");
	fd = open(RUN_DIR "/lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || fcntl(fd, F_OFD_SETLKW, &lock))
		return fail(-errno, "cannot lock " RUN_DIR "/lock: %m");
	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGHUP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	return fd;
}

/* Return: whether block device @inner is @outer or one of its partitions. */
static bool is_part_of(dev_t inner, dev_t outer)
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
static char *mounted_on(dev_t dev)
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

/*
 * Return: how many copies like ours @dev is the base of already; in *@other the
 * name of something else that holds it (to be freed), or NULL.
 */
static int count_copies(dev_t dev, char **other)
{
	char *path = xasprintf("/sys/dev/block/%u:%u/holders", major(dev), minor(dev));
	DIR *dir = opendir(path);
	struct dirent *entry;
	int copies = 0;

	*other = NULL;
	while (dir && !*other && (entry = readdir(dir))) {
		char *file = xasprintf("%s/%s/dev", path, entry->d_name), text[24];
		unsigned int maj, min;
		struct cow cow;

		if (entry->d_name[0] != '.' && !read_line(file, text, sizeof(text)) &&
		    sscanf(text, "%u:%u", &maj, &min) == 2) {
			if (strncmp(entry->d_name, "dm-", 3) || dm_find_number(maj, min, &cow) ||
			    cow.state != COW_LIVE)
				*other = xasprintf("%s", entry->d_name);
			else
				copies++;
		}
		free(file);
	}
	if (dir)
		closedir(dir);
	free(path);
	return copies;
}

/* A base must not change: refuse one that somebody may be writing to. */
static int check_unused(const char *base, dev_t dev)
{
	char *where = mounted_on(dev), *other, *node;
	int copies, fd, err = 0;

	if (where) {
		err = fail(-EBUSY, "base %s is mounted on %s; unmount it first", base, where);
		free(where);
		return err;
	}
	copies = count_copies(dev, &other);
	if (other) {
		err = fail(-EBUSY, "base %s is in use by %s", base, other);
		free(other);
		return err;
	}
	node = xasprintf("/dev/block/%u:%u", major(dev), minor(dev));
	fd = open(access(node, F_OK) ? base : node, O_RDONLY | O_EXCL | O_CLOEXEC);
	free(node);
	/* Copies share their base, each other user has it alone. */
	if (fd < 0 && !(errno == EBUSY && copies))
		return fail(-errno, errno == EBUSY ?
			    "base %s is in use, by swap, RAID or another program" :
			    "cannot open base %s: %m", base);
	if (fd >= 0)
		close(fd);
	return 0;
}

struct base {
	const char *text;		/* as the user gave it */
	int fd;				/* of the block device */
	dev_t dev;
	uint64_t bytes;
};

/* What can be found wrong with base= before anything is done about it. */
static int check_base(const char *text)
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

/* Opens the base, through a loop device or an NBD connection where it takes one. */
static int open_base(const struct args *args, int lock_fd, struct base *base)
{
	const char *text = args->value[KEY_BASE];
	char dev[PATH_MAX];
	struct stat st;

	base->text = text;
	if (strstr(text, "://"))
		base->fd = nbd_connect(args->mangled, text, lock_fd, dev);
	else if (!stat(text, &st) && S_ISREG(st.st_mode))
		base->fd = loop_attach(text, dev);
	else
		base->fd = open(text, O_RDONLY | O_CLOEXEC);
	if (base->fd < 0)
		return strstr(text, "://") || S_ISREG(st.st_mode) ? base->fd :
		       fail(-errno, "cannot open base %s: %m", text);
	if (fstat(base->fd, &st) || ioctl(base->fd, BLKGETSIZE64, &base->bytes))
		return fail(-errno, "cannot get the size of base %s: %m", text);
	base->dev = st.st_rdev;
	if (!base->bytes)
		return fail(-EIO, "base %s is empty", text);
	return 0;
}

/* TMPDIR where it names a tmpfs, as a word of the table; otherwise NULL. */
static char *tmpfs_from_environment(void)
{
	const char *dir = getenv("TMPDIR");
	char *full, word[3 * PATH_MAX];
	struct statfs fs;

	if (!dir || !*dir)
		return NULL;
	full = realpath(dir, NULL);
	if (!full || statfs(full, &fs) || fs.f_type != TMPFS_MAGIC ||
	    percent_encode(full, word, sizeof(word))) {
		warn("TMPDIR=%s is not on a tmpfs; what is written stays in memory, but not there",
		     dir);
		free(full);
		return NULL;
	}
	free(full);
	return xasprintf("%s", word);
}

static int parse_limit_key(const char *text, uint64_t *blocks)
{
	struct sysinfo info;

	sysinfo(&info);
	switch (-parse_limit(text, (uint64_t)info.totalram * info.mem_unit, blocks)) {
	case 0:
		return 0;
	case ERANGE:
		return fail(-EINVAL, "limit=%s is out of range: from %d bytes, or 1%% to 100%%",
			    text, BLOCK_BYTES);
	default:
		return fail(-EINVAL, "limit=%s is no size (4G), percentage (25%%) or none", text);
	}
}

struct shape {
	uint64_t limit_blocks;
	uint64_t bytes;			/* 0: that of the base */
	bool round_up;
};

static int parse_shape(const struct args *args, struct shape *shape)
{
	const char *limit = args->value[KEY_LIMIT], *size = args->value[KEY_SIZE];
	const char *round = args->value[KEY_ROUND];
	int err;

	shape->limit_blocks = NO_LIMIT;
	shape->bytes = 0;
	if (round && strcmp(round, "up") && strcmp(round, "down"))
		return fail(-EINVAL, "round=%s is neither up nor down", round);
	shape->round_up = round && !strcmp(round, "up");
	if (limit) {
		err = parse_limit_key(limit, &shape->limit_blocks);
		if (err)
			return err;
	}
	if (!size)
		return 0;
	err = parse_size(size, &shape->bytes);
	if (err == -ERANGE || (!err && (!shape->bytes || shape->bytes > INT64_MAX - BLOCK_BYTES)))
		return fail(-EINVAL, "size=%s is out of range", size);
	if (err)
		return fail(-EINVAL, "size=%s is no size (20G, 512M)", size);
	return 0;
}

static int make_device(const struct args *args, const struct shape *shape,
		       const struct base *base)
{
	uint64_t bytes = shape->bytes ? shape->bytes : base->bytes;
	char *tmpfs, *limit, *params;
	int words, err;

	if (shape->round_up)
		bytes += BLOCK_BYTES - 1;
	bytes -= bytes % BLOCK_BYTES;
	if (!bytes)
		return fail(-EINVAL, "%s would have no block of %d bytes; say round=up",
			    args->name, BLOCK_BYTES);
	tmpfs = tmpfs_from_environment();
	limit = shape->limit_blocks == NO_LIMIT ? xasprintf("%s", "") :
		xasprintf(" limit %" PRIu64, shape->limit_blocks);
	words = (*limit ? 2 : 0) + (tmpfs ? 2 : 0);
	params = xasprintf("%u:%u %d%s%s%s", major(base->dev), minor(base->dev), words, limit,
			   tmpfs ? " tmpfs " : "", tmpfs ?: "");
	err = dm_create(args, bytes / SECTOR_BYTES, params);
	free(params);
	free(limit);
	free(tmpfs);
	return err;
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
	return err ? err : nbd_release(args->mangled);
}

/* The name of a block device under /dev. */
static char *device_path(unsigned int maj, unsigned int min)
{
	char *link = xasprintf("/sys/dev/block/%u:%u", maj, min), *path;
	char *file = xasprintf("%s/dm/name", link), name[NAME_BYTES];
	char *real = realpath(link, NULL);

	if (!read_line(file, name, sizeof(name)))
		path = xasprintf("/dev/mapper/%s", name);
	else
		path = real ? xasprintf("/dev/%s", strrchr(real, '/') + 1) :
		       xasprintf("%u:%u", maj, min);
	free(real);
	free(file);
	free(link);
	return path;
}

/* The image file or address behind the base's device, or else the device. */
static char *base_source(const struct cow *cow)
{
	char *file = xasprintf("/sys/dev/block/%u:%u/loop/backing_file", cow->table.major,
			       cow->table.minor);
	char *dev = device_path(cow->table.major, cow->table.minor), text[PATH_MAX];
	struct nbd_link link;
	char *source;

	if (!read_line(file, text, sizeof(text)) && printable(text))
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

/* A device as JSON, the same wherever one is reported; sizes are in bytes. */
static struct json_object *describe(const struct cow *cow)
{
	const struct cow_status *status = &cow->status;
	struct json_object *object = json_object_new_object(), *served = NULL;
	struct export export;

	add_text(object, "name", xasprintf("%s", cow->name));
	add_text(object, "path", xasprintf("%s", cow->path));
	add_number(object, "size", cow->sectors * SECTOR_BYTES);
	add_text(object, "base", base_source(cow));
	add_text(object, "base_device", device_path(cow->table.major, cow->table.minor));
	add_text(object, "tmpfs", cow->table.tmpfs[0] ? xasprintf("%s", cow->table.tmpfs) : NULL);
	add_text(object, "health", xasprintf("%s", status->health));
	add_number(object, "used", status->used_blocks * BLOCK_BYTES);
	if (status->limit_blocks == NO_LIMIT)
		json_object_object_add(object, "limit", NULL);
	else
		add_number(object, "limit", status->limit_blocks * BLOCK_BYTES);
	add_number(object, "peak", status->peak_blocks * BLOCK_BYTES);
	add_number(object, "zeroed", status->zeroed_blocks * BLOCK_BYTES);
	add_number(object, "metadata", status->metadata_bytes);
	add_number(object, "writes_refused", status->writes_refused);
	add_number(object, "base_errors", status->base_errors);
	add_number(object, "open_count", cow->open_count);
	if (!export_find(cow->mangled, &export)) {
		served = json_object_new_object();
		add_text(served, "server", xasprintf("%s", export.server));
		add_text(served, "uri", xasprintf("%s", export.uri));
	}
	json_object_object_add(object, "export", served);
	return object;
}

static void print_json(struct json_object *object)
{
	puts(json_object_to_json_string_ext(object, JSON_C_TO_STRING_PRETTY |
					    JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(object);
}

static int report_created(const struct args *args)
{
	struct cow cow;
	int err = dm_find(args->mangled, &cow);

	if (err)
		return err;
	if (args->json)
		print_json(describe(&cow));
	else
		puts(cow.path);
	return 0;
}

int cmd_create(const struct args *args)
{
	struct base base = { .fd = -1 };
	struct shape shape;
	bool made = false;
	int lock, err;

	if (!args->value[KEY_BASE])
		return fail(-EINVAL, "create: base= is missing; see \"cowctl help create\"");
	err = parse_shape(args, &shape);
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
	err = open_base(args, lock, &base);
	if (!err && !interrupted()) {
		err = make_device(args, &shape, &base);
		made = !err;
	}
	/* The mapped device keeps a loop device from here on; without, it goes. */
	if (base.fd >= 0)
		close(base.fd);
	if (!err && interrupted())
		err = made && dm_remove(args) ? -EBUSY : -EINTR;
	if (err)
		nbd_release(args->mangled);
	else
		err = report_created(args);
out:
	close(lock);
	return err;
}

/* Return: 0 and the live device of ours that is meant, or -errno. */
static int find_cow(const struct args *args, struct cow *cow)
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
	if (cow->state == COW_FOREIGN)
		return fail(-ENODEV, "%s is another kind of mapped device", args->name);
	return 0;
}

/* Says who has the device open. */
static int fail_busy(const struct args *args, const struct cow *cow, const char *hint)
{
	dev_t dev = makedev(cow->major, cow->minor);
	char *where = mounted_on(dev), *other = NULL;
	int copies = 0;

	if (where)
		fail(-EBUSY, "%s is mounted on %s; unmount it first%s", args->name, where, hint);
	else
		copies = count_copies(dev, &other);
	if (other)
		fail(-EBUSY, "%s is in use by %s%s", args->name, other, hint);
	else if (copies)
		fail(-EBUSY, "%s is the base of another copy%s", args->name, hint);
	else if (!where)
		fail(-EBUSY, "%s is open in %d place(s); \"fuser -v %s\" shows them%s", args->name,
		     cow->open_count, cow->path, hint);
	free(where);
	free(other);
	return -EBUSY;
}

static int remove_locked(const struct args *args)
{
	struct export export;
	struct nbd_link link;
	struct cow cow;
	int err = dm_find(args->mangled, &cow);

	/* Without a device there may still be the end of an earlier remove to do. */
	if (err == -ENODEV && !nbd_find(args->mangled, &link))
		return nbd_release(args->mangled);
	if (err == -ENODEV || (!err && cow.state != COW_HALF_MADE))
		err = find_cow(args, &cow);
	if (err)
		return err;
	if (!export_find(args->mangled, &export))
		return fail(-EBUSY, "%s is exported at %s; \"cowctl unexport\" it first",
			    args->name, export.uri);
	if (cow.open_count)
		return fail_busy(args, &cow, "");
	return dm_remove(args) ?: nbd_release(args->mangled);
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

#define COLUMNS 7

/* A row of cells, the last of which needs no padding; owned by the table. */
static void fill_row(char **cells, struct json_object *device)
{
	struct json_object *served = json_object_object_get(device, "export");
	char size[16];

	cells[0] = xasprintf("%s", text(device, "name"));
	cells[1] = xasprintf("%s", human_size(number(device, "size"), size));
	cells[2] = used_text(device);
	cells[3] = limit_text(device);
	cells[4] = xasprintf("%s", text(device, "health"));
	cells[5] = xasprintf("%s", text(device, "base"));
	cells[6] = xasprintf("%s", served ? text(served, "uri") : "-");
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
		"NAME", "SIZE", "USED", "LIMIT", "HEALTH", "BASE", "EXPORT",
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

static void print_status(struct json_object *device)
{
	struct json_object *served = json_object_object_get(device, "export");
	static const char *const counters[][2] = {
		{ "writes refused", "writes_refused" },
		{ "base read errors", "base_errors" },
		{ "open", "open_count" },
	};
	static const char *const sizes[][2] = {
		{ "peak", "peak" }, { "zeroed", "zeroed" }, { "metadata", "metadata" },
	};
	char *used = used_text(device), *limit = limit_text(device), size[16];

	printf("%s\n", text(device, "path"));
	printf("  %-17s %s\n", "size", human_size(number(device, "size"), size));
	printf("  %-17s %s\n", "base", text(device, "base"));
	if (strcmp(text(device, "base"), text(device, "base_device")))
		printf("  %-17s %s\n", "base device", text(device, "base_device"));
	printf("  %-17s %s\n", "health", text(device, "health"));
	printf("  %-17s %s\n", "used", used);
	printf("  %-17s %s\n", "limit", limit);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		printf("  %-17s %s\n", sizes[i][0], human_size(number(device, sizes[i][1]), size));
	if (json_object_object_get(device, "tmpfs"))
		printf("  %-17s %s\n", "tmpfs", text(device, "tmpfs"));
	for (size_t i = 0; i < sizeof(counters) / sizeof(counters[0]); i++)
		printf("  %-17s %" PRIu64 "\n", counters[i][0], number(device, counters[i][1]));
	if (served)
		printf("  %-17s %s by %s\n", "export", text(served, "uri"), text(served, "server"));
	free(used);
	free(limit);
}

int cmd_status(const struct args *args)
{
	struct json_object *device;
	struct cow cow;
	int err = find_cow(args, &cow);

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

static int parse_force(const struct args *args, bool *force)
{
	const char *value = args->value[KEY_FORCE] ?: "false";

	*force = !strcmp(value, "true");
	return *force || !strcmp(value, "false") ? 0 :
	       fail(-EINVAL, "force=%s is neither true nor false", value);
}

/*
 * The page cache is emptied before the reset, or what is dirty in it would be
 * written to the fresh overlay, and after it, or its readers would see old data.
 */
static int reset_locked(const struct args *args, bool force)
{
	static const char hint[] = ", or say force=true";
	struct cow cow;
	int err = find_cow(args, &cow), fd;

	if (err)
		return err;
	if (cow.open_count && !force)
		return fail_busy(args, &cow, hint);
	fd = open(cow.path, O_RDONLY | O_CLOEXEC | (force ? 0 : O_EXCL));
	if (fd < 0)
		return errno == EBUSY ? fail_busy(args, &cow, hint) :
		       fail(-errno, "cannot open %s: %m", cow.path);
	ioctl(fd, BLKFLSBUF);
	err = dm_message(args, "reset");
	if (!err && ioctl(fd, BLKFLSBUF))
		err = fail(-errno, "cannot empty the page cache of %s: %m", cow.path);
	close(fd);
	return err;
}

int cmd_reset(const struct args *args)
{
	bool force;
	int err = parse_force(args, &force), lock;

	if (err)
		return err;
	lock = lock_name(args);
	if (lock < 0)
		return lock;
	err = reset_locked(args, force);
	close(lock);
	return err;
}

int cmd_set(const struct args *args)
{
	struct cow cow;
	uint64_t blocks;
	char *message;
	int err, lock;

	if (!args->value[KEY_LIMIT])
		return fail(-EINVAL, "set: limit= is missing; see \"cowctl help set\"");
	err = parse_limit_key(args->value[KEY_LIMIT], &blocks);
	if (err)
		return err;
	lock = lock_name(args);
	if (lock < 0)
		return lock;
	err = find_cow(args, &cow);
	message = blocks == NO_LIMIT ? xasprintf("limit none") :
		  xasprintf("limit %" PRIu64, blocks);
	if (!err)
		err = dm_message(args, message);
	free(message);
	close(lock);
	return err;
}

static void report_export(const struct args *args)
{
	struct json_object *object;
	struct export export;

	if (export_find(args->mangled, &export))
		return;
	if (!args->json) {
		puts(export.uri);
		return;
	}
	object = json_object_new_object();
	add_text(object, "name", xasprintf("%s", args->name));
	add_text(object, "server", xasprintf("%s", export.server));
	add_text(object, "uri", xasprintf("%s", export.uri));
	print_json(object);
}

int cmd_export(const struct args *args)
{
	int lock = lock_name(args), err;
	struct cow cow;

	if (lock < 0)
		return lock;
	err = find_cow(args, &cow);
	if (!err)
		err = export_start(&cow, args);
	if (!err)
		report_export(args);
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
