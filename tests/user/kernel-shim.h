/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What kernel/map.c needs of the kernel, in user space. tests/user/map.sh makes
 * this file stand for each <linux/...> header that map.c includes.
 *
 * Memory ordering is C11's, so that the thread sanitizer understands it; plain
 * accesses stay plain, so that it sees their races. A grace period ends only in
 * rcu_barrier(): what is freed too early by other means is found by the address
 * sanitizer.
 */
#ifndef KERNEL_SHIM_H
#define KERNEL_SHIM_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <asm/errno.h>

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned int gfp_t;

#define BITS_PER_LONG		(8 * (int)sizeof(long))
#define __rcu

#define GFP_KERNEL		0U
#define GFP_KERNEL_ACCOUNT	0U
#define GFP_NOIO		0U
#define __GFP_NOWARN		0U
#define __GFP_RETRY_MAYFAIL	0U

#define ARRAY_SIZE(a)		(sizeof(a) / sizeof((a)[0]))
#define container_of(ptr, type, member) \
	((type *)((char *)(ptr) - offsetof(type, member)))
#define DIV_ROUND_UP_ULL(n, d)	(((n) + (u64)(d) - 1) / (d))
#define min(a, b) ({ \
	__typeof__(a) __a = (a); \
	__typeof__(b) __b = (b); \
	__a < __b ? __a : __b; })
#define struct_size(p, member, n) \
	(sizeof(*(p)) + (size_t)(n) * sizeof((p)->member[0]))
#define __ffs(word)		((unsigned long)__builtin_ctzl(word))
#define hweight_long(word)	((unsigned int)__builtin_popcountl(word))

/* Warnings are counted; the tests say how many they expect. */
extern unsigned int shim_warnings;
#define WARN_ON_ONCE(condition) ({ \
	bool __failed = !!(condition); \
	if (__failed) \
		shim_warnings++; \
	__failed; })

/*
 * Atomics
 */

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	long counter;
} atomic_long_t;

#define SHIM_LOAD(p)		__atomic_load_n(p, __ATOMIC_RELAXED)
#define SHIM_ADD(n, p)		((void)__atomic_fetch_add(p, n, __ATOMIC_RELAXED))
#define atomic_read(v)		SHIM_LOAD(&(v)->counter)
#define atomic_set(v, n)	__atomic_store_n(&(v)->counter, n, __ATOMIC_RELAXED)
#define atomic_add(n, v)	SHIM_ADD(n, &(v)->counter)
#define atomic_sub(n, v)	SHIM_ADD(-(n), &(v)->counter)
#define atomic_long_read(v)	atomic_read(v)
#define atomic_long_set(v, n)	atomic_set(v, n)
#define atomic_long_add(n, v)	atomic_add((long)(n), v)
#define atomic_long_sub(n, v)	atomic_add(-(long)(n), v)
#define atomic_long_inc(v)	atomic_add(1, v)
#define atomic_long_dec(v)	atomic_add(-1, v)

#define READ_ONCE(x)		SHIM_LOAD(&(x))
#define WRITE_ONCE(x, value)	__atomic_store_n(&(x), value, __ATOMIC_RELAXED)
#define smp_load_acquire(p)	__atomic_load_n(p, __ATOMIC_ACQUIRE)

/* SHIM_RELEASE can be weakened to see that the tests find what comes of it. */
#ifndef SHIM_RELEASE
#define SHIM_RELEASE		__ATOMIC_RELEASE
#endif
#define try_cmpxchg_release(p, old, new) \
	__atomic_compare_exchange_n(p, old, new, false, SHIM_RELEASE, \
				    __ATOMIC_RELAXED)
#define cmpxchg(p, old, new) ({ \
	__typeof__(*(p)) __old = (old); \
	__atomic_compare_exchange_n(p, &__old, new, false, __ATOMIC_SEQ_CST, \
				    __ATOMIC_SEQ_CST); \
	__old; })

/*
 * RCU
 */

struct rcu_head {
	struct rcu_head *next;
	void (*func)(struct rcu_head *head);
};

#define RCU_INITIALIZER(p)	(p)
#define unrcu_pointer(p)	(p)
#define rcu_assign_pointer(p, v) __atomic_store_n(&(p), v, __ATOMIC_RELEASE)
#define RCU_INIT_POINTER(p, v)	((p) = (v))
/* A dependency orders what C11 can only say with acquire. */
#define rcu_dereference_check(p, c) __atomic_load_n(&(p), __ATOMIC_ACQUIRE)
#define rcu_dereference_raw(p)	rcu_dereference_check(p, 1)
#define rcu_dereference(p)	rcu_dereference_check(p, 1)
#define rcu_dereference_protected(p, c) (p)
#define rcu_access_pointer(p)	READ_ONCE(p)

void call_rcu(struct rcu_head *head, void (*func)(struct rcu_head *head));
void rcu_barrier(void);

/*
 * Memory: shim_fail_alloc counts down at each allocation, the one that finds
 * it at 1 fails; 0 lets all succeed.
 */

struct kmem_cache;

extern unsigned int shim_fail_alloc;
extern long shim_objects;	/* cache objects in use, also of dying leaves */

struct kmem_cache *kmem_cache_create(const char *name, unsigned int size,
				     unsigned int align, unsigned int flags,
				     void (*ctor)(void *object));
void kmem_cache_destroy(struct kmem_cache *cache);
void *kmem_cache_alloc(struct kmem_cache *cache, gfp_t gfp);
void kmem_cache_free(struct kmem_cache *cache, void *object);
void *kvzalloc(size_t bytes, gfp_t gfp);
void kvfree(void *memory);

#endif
