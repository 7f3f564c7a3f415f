/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of the fuzzer share: fuzz.c runs the rounds, fuzz_model.c knows
 * what may be read, fuzz_view.c that of views, fuzz_shrink.c makes failures simpler.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "stamp.h"

#define NAME "nbdcow-fuzz"
#define KIB(n) ((uint64_t)(n) * 2)	/* in sectors */
#define MIB(n) ((uint64_t)(n) * 2048)

#define LONGEST 2048		/* sectors of an operation */
#define RING 8			/* io_uring requests of a thread */
#define LARGEST MIB(129)	/* size that the device grows to */
#define THREADS 16
#define VIEWS 3			/* of the device at once */
#define TOTAL_LIMIT "/sys/module/dm_nbdcow/parameters/total_limit"

/* A part of the device that is used. */
struct window {
	uint64_t first;		/* sector */
	uint64_t sectors;
	unsigned int index;	/* of its first sector in the model */
};
#define WINDOWS 4
#define BUFFERED 3		/* the one for buffered I/O; the model knows the others */
#define MODEL (MIB(2) + KIB(256)) /* sectors of them */
extern const struct window windows[WINDOWS];

enum kind {
	READ, WRITE, DISCARD, ZEROOUT, PUNCH, ZERORANGE, FLUSH, LOOK,
	RESET, LIMIT, SUSPEND, RELOAD, CLEAR_ALL, CACHE, VIEW, UNVIEW,
};

enum { NOWAIT = 1, URING = 2, VECTOR = 4, DSYNC = 8 };

/* What a round may do without. */
enum {
	BUFFERED_IO, CONTROL, LIMITS, NOWAITS, URINGS, BIG, ZEROES, VM, CACHES, VIEWED, FEATURES
};
extern const char *const features[FEATURES];

struct op {
	enum kind kind;
	unsigned int flags;
	unsigned int window;	/* of a data operation; it never leaves it */
	uint64_t sector;	/* of the device */
	uint64_t count;		/* sectors */
	uint32_t tag;		/* of a write */
	unsigned int shift;	/* bytes by which the memory is misaligned */
	long limit;		/* blocks, 0 for none: LIMIT and RELOAD */
	unsigned int message;	/* which one: CACHE */
	unsigned int view;	/* which one: LOOK, VIEW and UNVIEW */
	bool total;		/* of all overlays: LIMIT */
	bool suspended;		/* done while the device is: RESET, RELOAD and VIEW */
	unsigned int suspend_flags; /* SUSPEND */
	unsigned int base;	/* which one: RELOAD and VIEW */
	uint64_t sectors;	/* of the new table, if longer: RELOAD; if shorter: VIEW */
	bool abandon;		/* cleared instead of taken: RELOAD */
	bool tail;		/* a discard that ends with the device within a block */
	uint64_t start, end;	/* on the model's clock; end 0: not ended */
	int result;
	unsigned int thread;
	unsigned int number;	/* in the history */
	unsigned int slot;	/* in the list of active operations */
	char *memory;		/* what buffer is in */
	char *buffer;
	struct iovec iov[4];
	int iovs;
};

/* How a write ended: it happened, it did not, or for some blocks only. */
enum outcome { DONE, NOT_DONE, MAYBE };

struct rng {
	uint64_t state;
};

/* The round. */
extern struct round {
	uint64_t seed;
	unsigned int number;
	unsigned int ops;	/* of each thread */
	uint64_t hot;		/* sectors of the part of a window that most use */
	unsigned int percent_hot;
	bool buffered;
	bool limits;
	bool control;
	bool nowait;
	bool big;		/* operations of up to LONGEST sectors */
	bool caches;		/* something is done to the cache of the base */
	unsigned int percent_views; /* of what the control thread does; 0: there are none */
	bool cow_on_read;	/* features of the tables */
	unsigned int cache_limit;
	unsigned int stripe;	/* sectors in turn for each thread; 0: all for all */
	bool tmpfs;		/* not the kernel's own one */
	uint64_t sectors;	/* of the device now */
	unsigned int base;
	long limit;
	long total_limit;
} cfg;

/* What was asked for. */
extern struct options {
	uint64_t seed;
	unsigned int seconds, threads, rounds, ops;
	bool repeat;
	unsigned int without;	/* bits of features */
	const char *tmpfs;	/* a directory of one, or NULL */
	const char *cgroup;	/* directory of a memory cgroup that is to be swapped out */
	char **bases;
	unsigned int nr_bases;
	unsigned int nr_nowait;	/* so many of them, the first ones, know REQ_NOWAIT */
} opt;

/* What a sector may have held: a write, from its start until it was overwritten. */
struct possible {
	uint64_t start, gone;
	uint32_t tag;
};

/* fuzz.c */
extern char device[64];
extern uint64_t base_sectors;
extern time_t deadline;		/* when to end */
extern volatile bool stopping;
extern bool quiet;		/* a failure is no news: it is being made simpler */
extern bool broken;		/* the round has failed; told once */
uint64_t next_random(struct rng *rng);
uint64_t below(struct rng *rng, uint64_t n);
bool percent(struct rng *rng, unsigned int n);
void reap_own(void);
void resume(const char *what);
void run_control(struct op *op, struct rng *rng);
bool run_sync(struct op *op, struct rng *rng);
struct op random_op(struct rng *rng, unsigned int thread);
struct op random_control(struct rng *rng, unsigned int thread);
void table_params(char *params, size_t size, unsigned int base, long limit);
void start_round(uint64_t seed, struct rng *rng);
void end_round(void);
bool threads_round(struct rng *rng);
bool verify(struct rng *rng);
void print_replay(void);
void die(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
void wrong(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
bool news(void);

/* fuzz_model.c */
extern const char *const kind_names[];
extern uint64_t limited_until;	/* no write may fail for space that begins later */
extern uint64_t total_ops, nowait_ops, nowait_again;
extern uint64_t wrong_sector;
extern int wrong_view;
void print_op(const struct op *op);
void print_under_way(void);
void print_history(uint64_t sector);
uint32_t initial_tag(uint64_t sector);
void model_init(void);
void model_reset(void);
void model_lock(void);
void model_unlock(void);
uint64_t model_tick(void);
uint32_t model_tag(uint64_t sector);
unsigned int model_possible(unsigned int index, uint64_t start, uint64_t end,
			    struct possible *to);
void model_count(unsigned int *least, unsigned int *most);
bool whole_device(const struct op *op);
void op_begin(struct op *op);
bool op_end(struct op *op, int result, enum outcome outcome);

/* fuzz_view.c */
void views_init(void);
bool views_exist(void);
void views_may_fail(void);
bool views_verify(void);
void views_remove(void);
bool view_look(struct op *op);
void view_begin(const struct op *op, struct rng *rng);
void view_end(const struct op *op);
uint32_t view_tag(uint64_t sector);
void view_params(char *params, size_t size, const struct op *op);

/* fuzz_shrink.c */
void simplify(void);
bool single_round(struct rng *rng);

#define CACHE_MESSAGES 12
extern const char *const cache_messages[CACHE_MESSAGES];

#endif
