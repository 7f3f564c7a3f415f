/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * cowctl: make, watch and export temporary writable copies of block devices.
 *
 * cmds.c, change.c, changes.c, prefetch.c, top.c, wait.c, diff.c and commit.c have the
 * commands and call every layer. dm.c, nbd.c, loop.c, parts.c, export.c and image.c know
 * only parse.c and util.c; helper.c, and watch.c and holes.c above it, also dm.c, and
 * holes.c nbd.c.
 * reconnect.c does by itself what a command does.
 * Functions return 0 or -errno. The layer that fails prints the one message,
 * through fail(); whoever gets the error back passes it on in silence.
 */
#ifndef COWCTL_H
#define COWCTL_H

#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifndef VERSION
#define VERSION "1.0.0"
#endif

#define BLOCK_BYTES	4096

/* The last one may be a part of a block; for any number of bytes. */
static inline uint64_t count_blocks(uint64_t bytes)
{
	return bytes / BLOCK_BYTES + !!(bytes % BLOCK_BYTES);
}

#define SECTOR_BYTES	512
#define NO_LIMIT	UINT64_MAX
#define NAME_BYTES	128	/* of a device-mapper name, with its NUL */
#define BUSY_MS		500	/* that udev may have open what somebody wrote to */
#define BUSY_PROBE_MS	10

/* Where a command leaves what has to be found again; a tmpfs, empty after boot. */
#define RUN_DIR		"/run/cowctl"

/* The exit codes; exit_code() maps errno to them, cowctl(8) documents them. */
enum {
	EXIT_USAGE = 2,
	EXIT_NO_DEVICE = 3,
	EXIT_IN_USE = 4,
	EXIT_NOT_PERMITTED = 5,
	EXIT_MISSING = 6,
	EXIT_CACHE_FULL = 7,
	EXIT_TIMEOUT = 8,
};

/* The keys of key=value arguments, in the order of the table in cowctl.c. */
enum key {
	KEY_BASE,
	KEY_LIMIT,
	KEY_SIZE,
	KEY_ROUND,
	KEY_SOCKET,
	KEY_PORT,
	KEY_ADDRESS,
	KEY_SERVER,
	KEY_FORCE,
	KEY_COW_ON_READ,
	KEY_COW_ON_CACHE,
	KEY_CACHE_LIMIT,
	KEY_CACHE,
	KEY_ON_BASE_ERROR,
	KEY_PARTITIONS,
	KEY_HOLES,
	KEY_RANGE,
	KEY_RATE,
	KEY_WAIT,
	KEY_SORT,
	KEY_DELAY,
	KEY_LOOKS,
	KEY_THRESHOLD,
	KEY_TIMEOUT,
	KEY_PER_CLIENT,
	KEY_PER_EXPORT_NAME,
	KEY_MAX_CLIENTS,
	KEY_OUTPUT,
	KEY_BACKING,
	KEY_FORMAT,
	KEY_TO,
	KEY_COUNT,
};

struct args {
	const char *name;		/* of the device, as typed */
	char mangled[NAME_BYTES];	/* as it is in /dev/mapper */
	const char *value[KEY_COUNT];	/* NULL where not given */
	const char *file;		/* the word after NAME, where one is a file */
	bool stop;			/* or the word stop */
	bool json;
	bool prometheus;
	bool watch;
	bool named;			/* NAME was given */
	mode_t umask;			/* that we were started with */
	char **command;			/* what follows --, or NULL */
};

/* parse.c */

struct nbd_uri {
	char host[256];			/* empty for a Unix socket */
	char port[6];
	char socket[108];		/* as long as sun_path */
	char export[4097];		/* the longest name NBD allows */
};

/* A table line: <major:minor> <#feature args> [<arg>]* */
struct cow_table {
	unsigned int major;
	unsigned int minor;
	uint64_t limit_blocks;
	uint64_t cache_limit_blocks;
	bool cow_on_read;
	bool cow_on_cache;
	bool queue_errors;
	char tmpfs[PATH_MAX];
};

/* A status line; see Documentation/dm-nbdcow.rst. */
struct cow_status {
	char health[16];
	uint64_t used_blocks;
	uint64_t limit_blocks;
	uint64_t peak_blocks;
	uint64_t zeroed_blocks;
	uint64_t metadata_bytes;
	uint64_t writes_refused;
	uint64_t base_errors;
	uint64_t cached_blocks;
	uint64_t cache_limit_blocks;
	uint64_t hit_sectors;
	uint64_t missed_sectors;
	uint64_t evicted_blocks;
	uint64_t overlay_sectors;
	uint64_t base_sectors;
	char prefetch[16];		/* its state; empty without one */
	uint64_t prefetch_done;		/* in blocks */
	uint64_t prefetch_total;
	uint64_t queued;
	uint64_t base_size_sectors;	/* when the copy was made */
};

/* A connection to an NBD server. */
struct nbd_link {
	char dev[32];			/* /dev/nbdN */
	char uri[3 * 4096 + 1024];	/* the longest that parse_nbd_uri() takes */
	bool connected;
};

/* What serves a device, and where. */
struct export {
	char server[16];
	char uri[PATH_MAX];
};

const char *name_error(const char *name);
int mangle_name(const char *name, char mangled[NAME_BYTES]);
int parse_size(const char *text, uint64_t *bytes);
int parse_limit(const char *text, uint64_t ram_bytes, uint64_t *blocks);
int parse_seconds(const char *text, uint64_t *ms);
int parse_threshold(const char *text, unsigned int *percent, uint64_t *bytes);
int parse_port(const char *text);
int parse_range(const char *text, uint64_t *start, uint64_t *end);
int parse_nbd_uri(const char *text, struct nbd_uri *uri);
int parse_table(const char *params, struct cow_table *table);
int format_table(const struct cow_table *table, char *line, size_t size);
int next_extent(const char **answer, uint64_t *blocks, char *kind);
int parse_status(const char *params, struct cow_status *status);
char *parse_mount(const char *line, unsigned int *major, unsigned int *minor);
long parse_nbd_record(const char *text, struct nbd_link *link);
int parse_export_record(const char *text, struct export *export);
bool is_server(const char *args, size_t size, const char *pid_file);
char *table_error(char *record);
void last_line(char *text, char *line, size_t size);
void unescape_octal(char *text);
int percent_encode(const char *text, char *out, size_t size);
const char *human_size(uint64_t bytes, char buf[16]);
const char *short_size(uint64_t bytes, char buf[16]);
const char *nearest(const char *word, const char *const *words);
bool printable(const char *text);
void make_printable(char *text);

/* util.c */

void put_message(const char *text);
int fail(int err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int flush_output(int err);
int io_error(int error);
int write_all(int fd, const void *buf, size_t bytes, uint64_t offset);
int exit_code(int err);
void show_progress(uint64_t done, uint64_t total, int *shown);
void end_progress(int shown);

char *xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int read_line(const char *path, char *buf, size_t size);
int write_file(const char *path, const char *text);
char *run_path(const char *slot, const char *suffix);
char *absolute_path(const char *path);
uint64_t device_bytes(dev_t dev);
void tmpfs_from_environment(char path[PATH_MAX]);
bool any_link(dev_t dev, const char *kind,
	      bool (*call)(const char *name, dev_t dev, void *arg), void *arg);
int open_alone(const char *path);
void stop_signals(sigset_t *set);
int open_stop_signals(void);
bool interrupted(void);
bool terminal_takes_colour(void);

struct run {
	const char *const *argv;
	const char *package;		/* that has argv[0] */
	int timeout_ms;
	int keep_fd;			/* stays open in the program; -1: none */
	bool finish;			/* it undoes something: signals do not stop it */
	int (*in_child)(void *arg);	/* called before exec; NULL: nothing */
	void *arg;
	char message[512];		/* last line it wrote to stderr */
};

int run(struct run *run);
int load_module(const char *name, char *message);
int call_apart(int (*call)(void *arg), void *arg, int wait_ms, bool finish);
int hold_file(int fd);
bool has_other_users(int fd);
bool still_held(int fd);
int64_t now_ms(void);

/* dm.c */

enum cow_state {
	COW_LIVE,			/* has a table, of our target */
	COW_HALF_MADE,			/* ours, but was left without a table */
	COW_VIEW,			/* a frozen view of one, see view.c */
	COW_FOREIGN,			/* of another target */
};

struct cow {
	enum cow_state state;
	char name[NAME_BYTES];		/* as users type it */
	char mangled[NAME_BYTES];
	char uuid[NAME_BYTES + 2];
	char path[PATH_MAX];
	unsigned int major;
	unsigned int minor;
	int open_count;
	uint64_t sectors;
	char params[4 * PATH_MAX];	/* the table line */
	struct cow_table table;
	struct cow_status status;
};

void dm_init(void);
int dm_need_target(void);
int dm_find(const char *mangled, struct cow *cow);
int dm_find_number(unsigned int major, unsigned int minor, struct cow *cow);
int dm_each(int (*call)(const struct cow *cow, void *arg), void *arg);
int dm_create(const struct args *args, uint64_t sectors, const char *params);
int dm_remove(const struct args *args);
int dm_reload(const struct cow *cow, uint64_t sectors, const char *params, bool finish);
void dm_clear(const char *mangled);
int dm_message(const struct args *args, const char *message);
int dm_send(const char *uuid, const char *message);
bool dm_exists(const char *uuid);
int dm_events(void);
int dm_arm_events(int fd);
void dm_close(void);
int dm_server_open(const char *mangled, uint64_t sectors, const char *params, int flags,
		   dev_t *dev);
int dm_server_remove(const char *mangled, bool when_closed);
void dm_server_sweep(void);
int dm_ask(dev_t dev, const char *message, char **answer);
int dm_view_open(const char *mangled, const struct cow *cow, dev_t *dev);
bool dm_view_failed(dev_t dev);
void dm_cancel_remove(const char *mangled);

/* loop.c */

int loop_attach(const char *path, char dev[PATH_MAX]);
struct stat;
bool loop_file(dev_t dev, struct stat *file);
bool loop_is_part(dev_t dev);

/* nbd.c */

#define SLOT_BYTES	(NAME_BYTES + 1)

int nbd_check(const char *text, struct nbd_uri *uri);
int nbd_connect(const char *mangled, const char *text, int lock_fd, char dev[PATH_MAX]);
int nbd_find(const char *mangled, struct nbd_link *link);
int nbd_release(const char *mangled);
void nbd_cut(const char *mangled);
int nbd_rename(const char *from, const char *to);
void nbd_next_slot(const char *mangled, char slot[SLOT_BYTES]);

/* parts.c */

struct part {
	unsigned int major;
	unsigned int minor;
};

int parts_find(const struct cow *cow, struct part **parts);
int parts_map(const char *path, bool finish);
int parts_unmap(const char *path);
int parts_renew(const struct cow *cow, const char *what, int err);

/* helper.c: processes that work for a device in the background */

int helper_start(const char *mangled, const char *kind, const char *text,
		 void (*work)(void *arg, int ready_fd), void *arg, int wait_ms);
void helper_ready(int ready_fd, int err);
int helper_find(const char *mangled, const char *kind, char *text, size_t size);
void helper_stop(const char *mangled, const char *kind);

/* watch.c */

int watch_start(const struct cow *cow, const char *path);
int watch_find(const char *mangled, char path[PATH_MAX]);
void watch_stop(const char *mangled);

/* holes.c */

void holes_start(const char *mangled, const char *uuid, const char *text, uint64_t base_bytes);
void holes_stop(const char *mangled);

/* reconnect.c */

int reconnect_start(const char *mangled, bool holes);
bool reconnect_runs(const char *mangled);
void reconnect_stop(const char *mangled);

/* export.c */

int export_find(const char *mangled, struct export *export);
int export_start(const struct cow *cow, const struct args *args);
int export_stop(const char *mangled, const char *name);
void export_forget(const char *mangled);

/* Where to listen: a Unix socket, or a TCP port of one address. */
struct listen {
	char socket[108];		/* as long as sun_path */
	const char *address;
	const char *port;
	char uri[PATH_MAX];
};

int listen_parse(const struct args *args, struct listen *listen);
int listen_check(const struct listen *listen);
int write_run_file(const char *slot, const char *suffix, const char *text);
int clear_away(const char *slot);
int find_plugin(bool needed, char **plugin);

/* cmds.c: what commands have in common */

struct base {
	const char *text;		/* as the user gave it */
	int fd;				/* of the block device */
	int lock;			/* see lock_device() */
	dev_t dev;
	uint64_t bytes;
};

#define NO_BASE	{ .fd = -1, .lock = -1 }

/* How to take a lock; only the first waits for it. */
enum lock { LOCK_WAIT, LOCK_TRY, LOCK_SHARE };

int lock_slot(const char *slot, enum lock how);
int lock_device(dev_t dev, enum lock how);
int lock_name(const struct args *args);
int find_cow(const struct args *args, struct cow *cow);
int check_base(const char *text);
int open_base(const char *text, const char *slot, int lock_fd, struct base *base);
void close_base(struct base *base);
int need_base(const struct args *args, const char *command);
int parse_blocks(const struct args *args, enum key key, uint64_t *blocks);
int parse_flag(const struct args *args, enum key key, bool fallback, bool *flag);
int parse_features(const struct args *args, struct cow_table *table, const char **watched);
int parse_bytes(const struct args *args, enum key key, uint64_t *bytes);
int parse_number(const struct args *args, enum key key, uint64_t *number);
int parse_time(const struct args *args, enum key key, uint64_t least_ms, uint64_t *ms);
char *device_path(unsigned int maj, unsigned int min);
struct json_object;
struct json_object *describe(const struct cow *cow);
void print_json(struct json_object *object);
void report_server(const struct args *args, const char *server, const char *uri);
int report(const struct args *args);
const char *key_name(enum key key);

/* What stands on a block device. */
struct holders {
	int copies;			/* that it is the base of */
	int views;
	char *other;			/* the name of something else, or NULL */
};

void find_holders(dev_t dev, struct holders *holders);
bool is_part_of(dev_t inner, dev_t outer);
char *mounted_on(dev_t dev);
bool stands_on(const char *name, dev_t upper, void *lower);
char *base_source(const struct cow *cow);
int fail_busy(const struct args *args, const struct cow *cow, const char *hint);
int check_parts_closed(const struct cow *cow, const char *hint);
int check_closed(const struct args *args, const struct cow *cow, const char *hint);

/* change.c: what a process in the background does, too */

bool base_answers(const struct cow *cow);
int rebase_again(const struct cow *was, const char *text, int lock, bool holes);

/* changes.c: what differs from the base */

enum kind { UNCHANGED, WRITTEN, ZEROED, KINDS };

/* Told to visitors in order, neighbours being of different kinds. */
struct range {
	uint64_t start;			/* in bytes */
	uint64_t end;
	enum kind kind;
};

int walk_device(const struct cow *cow, dev_t dev, uint64_t under_end,
		int (*visit)(const struct range *range, void *arg), void *arg);
int add_to_sums(const struct range *range, void *arg);

/* view.c: a device as it was at one instant */

struct view {
	struct cow cow;			/* the device itself, as it was then */
	char name[NAME_BYTES];
	dev_t dev;
	int fd;				/* reads it; -1 without one */
};

int view_open(const struct args *args, struct view *view,
	      int (*check)(const struct cow *cow, void *arg), void *arg);
int view_read(const struct view *view, void *buf, size_t bytes, uint64_t offset);
void view_close(struct view *view);

/* prometheus.c */

void print_prometheus(struct json_object *list);

/* cmds.c, change.c, changes.c, prefetch.c, top.c, wait.c, diff.c, commit.c: the commands */

int cmd_create(const struct args *args);
int cmd_remove(const struct args *args);
int cmd_list(const struct args *args);
int cmd_status(const struct args *args);
int cmd_top(const struct args *args);
int cmd_wait(const struct args *args);
int cmd_reset(const struct args *args);
int cmd_set(const struct args *args);
int cmd_rebase(const struct args *args);
int cmd_changes(const struct args *args);
int cmd_map(const struct args *args);
int cmd_prefetch(const struct args *args);
int cmd_diff(const struct args *args);
int cmd_load(const struct args *args);
int cmd_commit(const struct args *args);
int cmd_export(const struct args *args);
int cmd_unexport(const struct args *args);

/* serve.c */

int cmd_serve(const struct args *args);

#endif
