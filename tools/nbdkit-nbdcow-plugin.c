// SPDX-License-Identifier: GPL-2.0-only
/*
 * nbdkit plugin: serves temporary writable copies over NBD.
 *
 *	nbdkit nbdcow NAME		a device that cowctl has made
 *	nbdkit nbdcow base=BASE ...	overlays of the server's own: one for all
 *					clients, for each client or export name
 *
 * Devices are read and written past the page cache (O_DIRECT). So a write that
 * has been answered is in the overlay: flush and FUA have nothing left to do, a
 * full overlay is told to the one who writes (ENOSPC), what the kernel says about
 * extents is what a read finds, a reset is seen at once, and hundreds of overlays
 * do not hold copies of one base in the page cache: that is what the cache of the
 * base is for. Others who use the device through the page cache see the same,
 * because the kernel keeps the two coherent. What it takes is a buffer that
 * begins at a sector, which those of nbdkit do not: everything is copied once more.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "cowctl.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#define MAX_CLIENTS	256		/* unless told otherwise */
#define MAX_REQUEST	(64 << 20)	/* of nbdkit itself */
#define SMALL_BYTES	(16 << 10)	/* buffers on the stack */
#define CHUNK_BYTES	(2 << 20)	/* buffers that are kept, of a huge page each */
#define CHUNKS		16
#define POLL_FIRST	50000		/* ns, then twice as long each time */
#define POLL_MAX	5000000

static struct {
	const char *name;
	const char *base;
	bool per_client;
	bool per_export_name;
	unsigned int max_clients;
	struct cow_table table;		/* of all overlays */
	const char *overlay_key;	/* given, and for these only */
} config = {
	.name = "cow",
	.max_clients = MAX_CLIENTS,
	.table = { .limit_blocks = NO_LIMIT, .cache_limit_blocks = NO_LIMIT },
};

/* An overlay of the server's own. */
struct overlay {
	struct overlay *next;		/* on @overlays */
	char *export;			/* name it is for */
	char mangled[NAME_BYTES];
	dev_t dev;
	int fd;				/* keeps it: the kernel removes it with the last close */
	pthread_mutex_t turn;		/* one cache request at a time */
};

struct handle {
	int fd;
	dev_t dev;
	uint64_t bytes;
	uint32_t sector;		/* in bytes */
	bool writable;
	bool extents;
	struct overlay *overlay;	/* NULL for a device of cowctl's */
};

/* Covers what is below, and the making of devices, which libdevmapper does one at a time. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct overlay *overlays;	/* all there are */
static unsigned int overlay_count;
static unsigned int overlay_number;	/* the last one made */
static char params[4 * PATH_MAX];	/* their table line */
static uint64_t sectors;		/* their size */
static int base_fd = -1;		/* keeps a loop device */

/* For util.c and those that use it. */
void put_message(const char *text)
{
	nbdkit_error("%s", text);
}

/*
 * Parameters
 */

static int parse_blocks_of(const char *key, const char *value, uint64_t *blocks)
{
	struct sysinfo info;

	sysinfo(&info);
	switch (-parse_limit(value, (uint64_t)info.totalram * info.mem_unit, blocks)) {
	case 0:
		return 0;
	case ERANGE:
		nbdkit_error("%s=%s is out of range: from %d bytes to less than %s", key, value,
			     BLOCK_BYTES, "16 EiB, or 1% to 100%");
		return -1;
	default:
		nbdkit_error("%s=%s is no size (4G), percentage (25%%) or none", key, value);
		return -1;
	}
}

static int parse_bool(const char *value, bool *flag)
{
	int ret = nbdkit_parse_bool(value);

	*flag = ret == 1;
	return ret < 0 ? -1 : 0;
}

static int nbdcow_config(const char *key, const char *value)
{
	if (!strcmp(key, "name")) {
		config.name = value;
		return 0;
	}
	if (!strcmp(key, "base")) {
		config.base = nbdkit_realpath(value);
		return config.base ? 0 : -1;
	}
	config.overlay_key = key;
	if (!strcmp(key, "per-client"))
		return parse_bool(value, &config.per_client);
	if (!strcmp(key, "per-export-name"))
		return parse_bool(value, &config.per_export_name);
	if (!strcmp(key, "max-clients"))
		return nbdkit_parse_unsigned(key, value, &config.max_clients);
	if (!strcmp(key, "limit"))
		return parse_blocks_of(key, value, &config.table.limit_blocks);
	if (!strcmp(key, "cache-limit"))
		return parse_blocks_of(key, value, &config.table.cache_limit_blocks);
	if (!strcmp(key, "cow-on-read"))
		return parse_bool(value, &config.table.cow_on_read);
	if (!strcmp(key, "cow-on-cache"))
		return parse_bool(value, &config.table.cow_on_cache);
	nbdkit_error("unknown parameter %s", key);
	return -1;
}

static int nbdcow_config_complete(void)
{
	const char *why = name_error(config.name);

	if (why) {
		nbdkit_error("the name \"%s\" %s", config.name, why);
		return -1;
	}
	if (config.per_client && config.per_export_name) {
		nbdkit_error("per-client and per-export-name exclude each other");
		return -1;
	}
	if (!config.base && config.overlay_key) {
		nbdkit_error("%s= is for overlays of the server's own, which need base=",
			     config.overlay_key);
		return -1;
	}
	if (!config.max_clients) {
		nbdkit_error("max-clients=0 would serve nobody");
		return -1;
	}
	return 0;
}

/*
 * Overlays of the server's own
 */

/* Return: the base as a descriptor of a block device, or -1. */
static int open_base_device(void)
{
	char dev[PATH_MAX];
	struct stat st;
	int fd;

	if (stat(config.base, &st)) {
		nbdkit_error("cannot find base %s: %m", config.base);
		return -1;
	}
	if (S_ISREG(st.st_mode)) {
		fd = loop_attach(config.base, dev);
		return fd < 0 ? -1 : fd;
	}
	if (!S_ISBLK(st.st_mode)) {
		nbdkit_error("base %s is no block device or image file", config.base);
		return -1;
	}
	fd = open(config.base, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		nbdkit_error("cannot open base %s: %m", config.base);
	return fd;
}

/* The table line of all overlays, and their size. */
static int make_table(void)
{
	uint64_t bytes;
	struct stat st;

	if (fstat(base_fd, &st) || ioctl(base_fd, BLKGETSIZE64, &bytes)) {
		nbdkit_error("cannot get the size of base %s: %m", config.base);
		return -1;
	}
	sectors = bytes / BLOCK_BYTES * (BLOCK_BYTES / SECTOR_BYTES);
	if (!sectors) {
		nbdkit_error("base %s has no block of %d bytes", config.base, BLOCK_BYTES);
		return -1;
	}
	config.table.major = major(st.st_rdev);
	config.table.minor = minor(st.st_rdev);
	tmpfs_from_environment(config.table.tmpfs);
	if (format_table(&config.table, params, sizeof(params))) {
		nbdkit_error("the path of TMPDIR is too long");
		return -1;
	}
	return 0;
}

/* Called with @lock. The device goes when its clients have closed it, if not now. */
static void drop_overlay(struct overlay *overlay)
{
	struct overlay **link = &overlays;

	while (*link && *link != overlay)
		link = &(*link)->next;
	if (*link) {
		*link = overlay->next;
		overlay_count--;
	}
	if (overlay->fd >= 0)
		close(overlay->fd);
	/* The kernel may have been quicker. */
	dm_server_remove(overlay->mangled, false);
	free(overlay->export);
	free(overlay);
}

static int make_device(struct overlay *overlay)
{
	char mangled[NAME_BYTES];
	int n;

	if (mangle_name(config.name, mangled))
		return -ENAMETOOLONG;
	n = snprintf(overlay->mangled, sizeof(overlay->mangled), "%s-%ld-%u", mangled,
		     (long)getpid(), ++overlay_number);
	if (n >= (int)sizeof(overlay->mangled)) {
		nbdkit_error("the name \"%s\" is too long", config.name);
		return -ENAMETOOLONG;
	}
	overlay->fd = dm_server_open(overlay->mangled, sectors, params,
				     O_RDWR | O_DIRECT | O_NOATIME, &overlay->dev);
	if (overlay->fd >= 0)
		return 0;
	overlay->mangled[0] = '\0';
	return -EIO;
}

/* Called with @lock. Return: a new overlay for clients of this export name, or NULL. */
static struct overlay *make_overlay(const char *export)
{
	struct overlay *overlay;

	if (overlay_count >= config.max_clients) {
		nbdkit_error("there are %u %s already, as many as max-clients allows",
			     overlay_count, config.per_client ? "clients" : "export names");
		return NULL;
	}
	overlay = calloc(1, sizeof(*overlay));
	if (!overlay) {
		nbdkit_error("out of memory");
		return NULL;
	}
	overlay->fd = -1;
	pthread_mutex_init(&overlay->turn, NULL);
	overlay->export = strdup(export);
	overlay->next = overlays;
	overlays = overlay;
	overlay_count++;
	if (!overlay->export || make_device(overlay)) {
		drop_overlay(overlay);
		return NULL;
	}
	return overlay;
}

/* Called with @lock. Return: the overlay for a client of this export name, or NULL. */
static struct overlay *get_overlay(const char *export)
{
	struct overlay *overlay = overlays;

	if (config.per_client)
		return make_overlay(export);
	if (!config.per_export_name)
		export = "";
	while (overlay && strcmp(overlay->export, export))
		overlay = overlay->next;
	return overlay ?: make_overlay(export);
}

/* Makes one, to find out now what would go wrong with the first client. */
static int try_overlay(void)
{
	struct overlay *overlay;

	pthread_mutex_lock(&lock);
	overlay = make_overlay("");
	if (overlay)
		drop_overlay(overlay);
	pthread_mutex_unlock(&lock);
	return overlay ? 0 : -1;
}

/*
 * The server
 */

static void nbdcow_load(void)
{
	dm_init();
}

static int find_device(struct cow *cow)
{
	char mangled[NAME_BYTES];
	int err = mangle_name(config.name, mangled);

	if (!err)
		err = dm_find(mangled, cow);
	if (!err && cow->state == COW_LIVE)
		return 0;
	if (!err || err == -ENODEV)
		nbdkit_error("there is no device %s; \"cowctl list\" shows those there are",
			     config.name);
	return -1;
}

static int nbdcow_get_ready(void)
{
	struct cow *cow;
	int err;

	if (!config.base) {
		cow = malloc(sizeof(*cow));
		err = cow ? find_device(cow) : -1;
		free(cow);
		return err;
	}
	if (dm_need_target())
		return -1;
	dm_server_sweep();
	base_fd = open_base_device();
	if (base_fd < 0 || make_table())
		return -1;
	return try_overlay();
}

static void nbdcow_unload(void)
{
	while (overlays)
		drop_overlay(overlays);
	if (base_fd >= 0)
		close(base_fd);
	free((char *)config.base);
}

static int nbdcow_list_exports(int readonly, int is_tls, struct nbdkit_exports *exports)
{
	struct overlay *overlay;
	int err = nbdkit_use_default_export(exports);

	(void)readonly;
	(void)is_tls;
	if (!config.per_export_name)
		return err;
	pthread_mutex_lock(&lock);
	for (overlay = overlays; overlay && !err; overlay = overlay->next)
		if (*overlay->export)
			err = nbdkit_add_export(exports, overlay->export, overlay->mangled);
	pthread_mutex_unlock(&lock);
	return err;
}

/*
 * Connections
 */

static int open_device(struct handle *handle, bool readonly)
{
	struct cow *cow = malloc(sizeof(*cow));
	struct stat st;
	int err;

	/* Where the node is missing libdevmapper makes it. */
	pthread_mutex_lock(&lock);
	err = cow ? find_device(cow) : -1;
	pthread_mutex_unlock(&lock);
	if (err) {
		free(cow);
		return -1;
	}
	handle->fd = open(cow->path, (readonly ? O_RDONLY : O_RDWR) | O_DIRECT | O_NOATIME |
			  O_CLOEXEC);
	if (handle->fd < 0) {
		nbdkit_error("cannot open %s: %m", cow->path);
	} else if (fstat(handle->fd, &st) ||
		   st.st_rdev != makedev(cow->major, cow->minor)) {
		nbdkit_error("%s is not the device %s", cow->path, cow->name);
		close(handle->fd);
		handle->fd = -1;
	}
	handle->dev = makedev(cow->major, cow->minor);
	free(cow);
	return handle->fd < 0 ? -1 : 0;
}

static int open_overlay(struct handle *handle)
{
	const char *export = nbdkit_export_name();

	if (!export)
		return -1;
	if (config.per_export_name && !printable(export)) {
		nbdkit_error("an export name contains a character that cannot be printed");
		return -1;
	}
	pthread_mutex_lock(&lock);
	handle->overlay = get_overlay(export);
	pthread_mutex_unlock(&lock);
	if (!handle->overlay)
		return -1;
	nbdkit_debug("export \"%s\": overlay %s", export, handle->overlay->mangled);
	handle->fd = handle->overlay->fd;
	handle->dev = handle->overlay->dev;
	return 0;
}

static void nbdcow_close(void *opaque)
{
	struct handle *handle = opaque;

	if (!handle->overlay) {
		close(handle->fd);
	} else if (config.per_client) {
		pthread_mutex_lock(&lock);
		drop_overlay(handle->overlay);
		pthread_mutex_unlock(&lock);
	}
	free(handle);
}

static void *nbdcow_open(int readonly)
{
	struct handle *handle = calloc(1, sizeof(*handle));
	char *answer = NULL;
	int sector;

	if (!handle) {
		nbdkit_error("out of memory");
		return NULL;
	}
	handle->fd = -1;
	handle->writable = !readonly;
	if (config.base ? open_overlay(handle) : open_device(handle, readonly)) {
		free(handle);
		return NULL;
	}
	if (ioctl(handle->fd, BLKSSZGET, &sector) ||
	    ioctl(handle->fd, BLKGETSIZE64, &handle->bytes)) {
		nbdkit_error("cannot get the size of the device: %m");
		nbdcow_close(handle);
		return NULL;
	}
	handle->sector = sector;
	/* Older modules do not know it. */
	handle->extents = !dm_ask(handle->dev, "extents 0 1", &answer);
	free(answer);
	return handle;
}

static const char *nbdcow_export_description(void *opaque)
{
	struct handle *handle = opaque;

	return nbdkit_strdup_intern(handle->overlay ? handle->overlay->mangled : config.name);
}

static int64_t nbdcow_get_size(void *handle)
{
	return ((struct handle *)handle)->bytes;
}

static int nbdcow_block_size(void *handle, uint32_t *minimum, uint32_t *preferred,
			     uint32_t *maximum)
{
	*minimum = ((struct handle *)handle)->sector;
	*preferred = BLOCK_BYTES;
	*maximum = MAX_REQUEST;
	return 0;
}

static int nbdcow_can_write(void *handle)
{
	return ((struct handle *)handle)->writable;
}

static int nbdcow_can_extents(void *handle)
{
	return ((struct handle *)handle)->extents;
}

static int nbdcow_can_fua(void *handle)
{
	(void)handle;
	return NBDKIT_FUA_NATIVE;
}

static int nbdcow_can_cache(void *handle)
{
	(void)handle;
	return NBDKIT_CACHE_NATIVE;
}

/* Connections of one client would each have their own overlay. */
static int nbdcow_can_multi_conn(void *handle)
{
	(void)handle;
	return !config.per_client;
}

static int nbdcow_yes(void *handle)
{
	(void)handle;
	return 1;
}

static int nbdcow_no(void *handle)
{
	(void)handle;
	return 0;
}

/*
 * Data
 */

/* A client is told what NBD has a number for; all else would become EINVAL. */
static int io_failed(const char *what, uint64_t offset, int err)
{
	if (err != ENOSPC && err != ENOMEM && err != EROFS && err != EPERM)
		errno = EIO;
	else
		errno = err;
	nbdkit_error("%s at offset %" PRIu64 ": %s", what, offset, strerror(err));
	return -1;
}

static pthread_mutex_t chunk_lock = PTHREAD_MUTEX_INITIALIZER;
static void *chunks[CHUNKS];		/* free ones */
static unsigned int chunk_count;

static void *get_chunk(void)
{
	void *chunk = NULL;

	pthread_mutex_lock(&chunk_lock);
	if (chunk_count)
		chunk = chunks[--chunk_count];
	pthread_mutex_unlock(&chunk_lock);
	if (chunk)
		return chunk;
	chunk = aligned_alloc(CHUNK_BYTES, CHUNK_BYTES);
	/* The kernel need not look up each page of it. */
	if (chunk)
		madvise(chunk, CHUNK_BYTES, MADV_HUGEPAGE);
	return chunk;
}

static void put_chunk(void *chunk)
{
	pthread_mutex_lock(&chunk_lock);
	if (chunk_count < CHUNKS) {
		chunks[chunk_count++] = chunk;
		chunk = NULL;
	}
	pthread_mutex_unlock(&chunk_lock);
	free(chunk);
}

/* pread() or pwrite() for all of it. Return: 0 or an errno. */
static int do_all(bool write, int fd, char *buf, size_t count, uint64_t offset)
{
	while (count) {
		ssize_t n = write ? pwrite(fd, buf, count, offset) :
				    pread(fd, buf, count, offset);

		if (n <= 0)
			return n ? errno : EIO;
		buf += n;
		count -= n;
		offset += n;
	}
	return 0;
}

/*
 * A part of a request, and the whole sectors around it, which go through @room.
 * Clients are told to ask for whole sectors, but need not.
 */
struct window {
	char *room;
	uint64_t start;
	size_t length;
	size_t skip;			/* of @room, before the part */
	size_t count;			/* of the part */
};

/*
 * Who writes a part of a sector reads the whole of it before, and must not undo what
 * another one writes, trims or zeroes meanwhile.
 */
static pthread_rwlock_t edge_lock = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

/* @buf is NULL for zeroes. Return: 0 or an errno. */
static int write_window(const struct handle *handle, const struct window *w, const char *buf)
{
	bool whole = w->count == w->length;
	int err = 0;

	if (whole) {
		pthread_rwlock_rdlock(&edge_lock);
	} else {
		pthread_rwlock_wrlock(&edge_lock);
		err = do_all(false, handle->fd, w->room, w->length, w->start);
	}
	if (!err && buf)
		memcpy(w->room + w->skip, buf, w->count);
	else if (!err)
		memset(w->room + w->skip, 0, w->count);
	if (!err)
		err = do_all(true, handle->fd, w->room, w->length, w->start);
	pthread_rwlock_unlock(&edge_lock);
	return err;
}

static int read_window(const struct handle *handle, const struct window *w, char *buf)
{
	int err = do_all(false, handle->fd, w->room, w->length, w->start);

	if (!err)
		memcpy(buf, w->room + w->skip, w->count);
	return err;
}

/* Reads into @in, or writes @out, or, with neither, zeroes. */
static int transfer(const struct handle *handle, char *in, const char *out, size_t count,
		    uint64_t offset)
{
	char small[SMALL_BYTES] __attribute__((aligned(BLOCK_BYTES))), *chunk = NULL;
	size_t mask = handle->sector - 1, room = SMALL_BYTES;
	struct window w = { .room = small };
	int err = 0;

	if (count + 2 * handle->sector > SMALL_BYTES) {
		chunk = get_chunk();
		if (!chunk)
			return io_failed("no buffer", offset, ENOMEM);
		w.room = chunk;
		room = CHUNK_BYTES;
	}
	for (size_t done = 0; done < count && !err; done += w.count) {
		w.skip = (offset + done) & mask;
		w.start = offset + done - w.skip;
		w.count = count - done < room - w.skip ? count - done : room - w.skip;
		w.length = (w.skip + w.count + mask) & ~mask;
		err = in ? read_window(handle, &w, in + done) :
		      write_window(handle, &w, out ? out + done : NULL);
	}
	if (chunk)
		put_chunk(chunk);
	return err ? io_failed(in ? "read" : "write", offset, err) : 0;
}

static int nbdcow_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
	(void)flags;
	return transfer(handle, buf, NULL, count, offset);
}

static int nbdcow_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset,
			 uint32_t flags)
{
	(void)flags;
	return transfer(handle, NULL, buf, count, offset);
}

/* What was answered is in the overlay, and that is all there is. */
static int nbdcow_flush(void *handle, uint32_t flags)
{
	(void)handle;
	(void)flags;
	return 0;
}

/* The whole sectors in a range. Return: false when there is none. */
static bool whole_sectors(const struct handle *handle, uint32_t count, uint64_t offset,
			  uint64_t range[2])
{
	uint64_t mask = handle->sector - 1;
	uint64_t start = (offset + mask) & ~mask, end = (offset + count) & ~mask;

	range[0] = start;
	range[1] = end > start ? end - start : 0;
	return range[1];
}

static int nbdcow_trim(void *opaque, uint32_t count, uint64_t offset, uint32_t flags)
{
	struct handle *handle = opaque;
	uint64_t range[2];
	int err;

	(void)flags;
	if (!whole_sectors(handle, count, offset, range))
		return 0;
	pthread_rwlock_rdlock(&edge_lock);
	err = ioctl(handle->fd, BLKDISCARD, range) ? errno : 0;
	pthread_rwlock_unlock(&edge_lock);
	return err ? io_failed("trim", offset, err) : 0;
}

/* Without MAY_TRIM the client wants the blocks allocated: they become data. */
static int nbdcow_zero(void *opaque, uint32_t count, uint64_t offset, uint32_t flags)
{
	const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	bool fast = flags & NBDKIT_FLAG_FAST_ZERO;
	struct handle *handle = opaque;
	uint64_t range[2];
	int err;

	if (!whole_sectors(handle, count, offset, range))
		return transfer(handle, NULL, NULL, count, offset);
	err = EOPNOTSUPP;
	if (flags & NBDKIT_FLAG_MAY_TRIM) {
		pthread_rwlock_rdlock(&edge_lock);
		err = fallocate(handle->fd, mode, range[0], range[1]) ? errno : 0;
		pthread_rwlock_unlock(&edge_lock);
	}
	if (err == EOPNOTSUPP && fast) {
		errno = err;
		nbdkit_debug("zero at offset %" PRIu64 ": not faster than to write", offset);
		return -1;
	}
	if (err == EOPNOTSUPP)
		return transfer(handle, NULL, NULL, count, offset);
	if (err)
		return io_failed("zero", offset, err);
	/* and what is left of sectors at both ends */
	if (range[0] > offset && transfer(handle, NULL, NULL, range[0] - offset, offset))
		return -1;
	range[0] += range[1];
	return offset + count > range[0] ?
	       transfer(handle, NULL, NULL, offset + count - range[0], range[0]) : 0;
}

/*
 * Extents and cache
 */

static int add_extents(uint64_t offset, uint64_t end, const char *answer,
		       struct nbdkit_extents *extents)
{
	uint64_t start = offset / BLOCK_BYTES * BLOCK_BYTES, blocks, stop;
	char kind;

	while (start < end && next_extent(&answer, &blocks, &kind) > 0) {
		uint32_t type = kind == 'h' || kind == 'z' ?
				NBDKIT_EXTENT_HOLE | NBDKIT_EXTENT_ZERO : 0;

		if (blocks > (UINT64_MAX - start) / BLOCK_BYTES)
			break;
		stop = start + blocks * BLOCK_BYTES;
		/* Of 4 GiB and more nbdkit would tell a length that is no multiple. */
		if (stop > end)
			stop = end;
		if (stop > offset) {
			if (nbdkit_add_extent(extents, offset, stop - offset, type))
				return -1;
			offset = stop;
		}
		start = stop;
	}
	return 0;
}

/* As many as one answer of the kernel holds; the client asks for the rest. */
static int nbdcow_extents(void *opaque, uint32_t count, uint64_t offset, uint32_t flags,
			  struct nbdkit_extents *extents)
{
	struct handle *handle = opaque;
	uint64_t end = offset + count;
	uint64_t first = offset / BLOCK_BYTES, last = count_blocks(end);
	char *answer = NULL, message[64];
	int err;

	(void)flags;
	snprintf(message, sizeof(message), "extents %" PRIu64 " %" PRIu64, first, last - first);
	err = dm_ask(handle->dev, message, &answer);
	if (err)
		return io_failed("block status", offset, -err);
	err = add_extents(offset, end, answer, extents);
	free(answer);
	return err;
}

/* Whether that is how a prefetch of so many blocks is; those of others are mostly larger. */
static bool prefetch_is(const struct cow *cow, uint64_t blocks, const char *state)
{
	return cow->status.prefetch_total <= blocks && !strcmp(cow->status.prefetch, state);
}

/* Return: 0 when it has ended and did not fail, or an errno. */
static int prefetch(const struct handle *handle, uint64_t first, uint64_t blocks,
		    struct cow *cow)
{
	unsigned int pause = POLL_FIRST;
	char message[64];
	int err;

	snprintf(message, sizeof(message), "prefetch %" PRIu64 " %" PRIu64, first, blocks);
	err = -dm_ask(handle->dev, message, NULL);
	while (!err) {
		err = -dm_find_number(major(handle->dev), minor(handle->dev), cow);
		if (err || !prefetch_is(cow, blocks, "running"))
			break;
		if (nbdkit_nanosleep(0, pause))
			err = errno;
		pause = pause < POLL_MAX / 2 ? 2 * pause : POLL_MAX;
	}
	return err ?: prefetch_is(cow, blocks, "failed") ? EIO : 0;
}

/*
 * The reply tells the client that it is done, so wait for it, by looking again and
 * again: device-mapper's events are for the administrator, and a read of the last block
 * would wait for no other. A device does one prefetch at a time, so ours take turns.
 * While somebody else's runs, which may be slow on purpose, there is only read-ahead;
 * that is for cow-on-cache, since we read past the page cache.
 */
static int nbdcow_cache(void *opaque, uint32_t count, uint64_t offset, uint32_t flags)
{
	static pthread_mutex_t device_turn = PTHREAD_MUTEX_INITIALIZER;
	struct handle *handle = opaque;
	pthread_mutex_t *turn = handle->overlay ? &handle->overlay->turn : &device_turn;
	uint64_t first = offset / BLOCK_BYTES;
	uint64_t last = count_blocks(offset + count);
	struct cow *cow = calloc(1, sizeof(*cow));
	int err = ENOMEM;

	(void)flags;
	if (cow) {
		pthread_mutex_lock(turn);
		err = prefetch(handle, first, last - first, cow);
		pthread_mutex_unlock(turn);
	}
	if (err == EBUSY || err == EINVAL) {
		err = 0;
		if (!dm_find_number(major(handle->dev), minor(handle->dev), cow) &&
		    cow->table.cow_on_cache)
			posix_fadvise(handle->fd, offset, count, POSIX_FADV_WILLNEED);
	}
	free(cow);
	return err ? io_failed("cache", offset, err) : 0;
}

static struct nbdkit_plugin plugin = {
	.name			= "nbdcow",
	.longname		= "nbdkit nbdcow plugin",
	.version		= VERSION,
	.description		= "Temporary writable copies of block devices",
	.load			= nbdcow_load,
	.unload			= nbdcow_unload,
	.config			= nbdcow_config,
	.config_complete	= nbdcow_config_complete,
	.config_help		=
		"[name=]<NAME>               A device made by cowctl; \"cow\" by default.\n"
		"base=<DEVICE|FILE>          Overlays of the server's own instead: one for all,\n"
		"per-client=true             or for each connection,\n"
		"per-export-name=true        or for each export name.\n"
		"max-clients=<N>             The most overlays; 256 by default.\n"
		"limit=<SIZE|PERCENT|none>   The most each of them may store.\n"
		"cow-on-read=true            Keep what is read from the base in its cache.\n"
		"cow-on-cache=true           Keep what is read ahead.\n"
		"cache-limit=<SIZE|PERCENT|none>\n"
		"                            The most that cache may hold.",
	.magic_config_key	= "name",
	.get_ready		= nbdcow_get_ready,
	.list_exports		= nbdcow_list_exports,
	.open			= nbdcow_open,
	.close			= nbdcow_close,
	.export_description	= nbdcow_export_description,
	.get_size		= nbdcow_get_size,
	.block_size		= nbdcow_block_size,
	.can_write		= nbdcow_can_write,
	.can_flush		= nbdcow_yes,
	.can_trim		= nbdcow_yes,
	.can_zero		= nbdcow_yes,
	.can_fast_zero		= nbdcow_yes,
	.can_extents		= nbdcow_can_extents,
	.can_fua		= nbdcow_can_fua,
	.can_multi_conn		= nbdcow_can_multi_conn,
	.can_cache		= nbdcow_can_cache,
	.is_rotational		= nbdcow_no,
	.pread			= nbdcow_pread,
	.pwrite			= nbdcow_pwrite,
	.flush			= nbdcow_flush,
	.trim			= nbdcow_trim,
	.zero			= nbdcow_zero,
	.extents		= nbdcow_extents,
	.cache			= nbdcow_cache,
	.errno_is_preserved	= 1,
};

NBDKIT_REGISTER_PLUGIN(plugin)
