// SPDX-License-Identifier: GPL-2.0-only
/* Memory and RCU for kernel/map.c in user space. */
#include "kernel-shim.h"

struct kmem_cache {
	size_t size;
};

unsigned int shim_warnings;
unsigned int shim_fail_alloc;
long shim_objects;

static struct rcu_head *dying;

static bool alloc_fails(void)
{
	unsigned int left = SHIM_LOAD(&shim_fail_alloc);

	while (left)
		if (__atomic_compare_exchange_n(&shim_fail_alloc, &left, left - 1,
						false, __ATOMIC_RELAXED,
						__ATOMIC_RELAXED))
			return left == 1;
	return false;
}

struct kmem_cache *kmem_cache_create(const char *name, unsigned int size,
				     unsigned int align, unsigned int flags,
				     void (*ctor)(void *object))
{
	struct kmem_cache *cache = alloc_fails() ? NULL : malloc(sizeof(*cache));

	(void)name;
	(void)align;
	(void)flags;
	(void)ctor;
	if (cache)
		cache->size = size;
	return cache;
}

void kmem_cache_destroy(struct kmem_cache *cache)
{
	if (SHIM_LOAD(&shim_objects))
		shim_warnings++;
	free(cache);
}

void *kmem_cache_alloc(struct kmem_cache *cache, gfp_t gfp)
{
	void *object = alloc_fails() ? NULL : malloc(cache->size);

	(void)gfp;
	if (object) {
		/* as dirty as the kernel's */
		memset(object, 0x6b, cache->size);
		SHIM_ADD(1, &shim_objects);
	}
	return object;
}

void kmem_cache_free(struct kmem_cache *cache, void *object)
{
	(void)cache;
	SHIM_ADD(-1, &shim_objects);
	free(object);
}

void *kvzalloc(size_t bytes, gfp_t gfp)
{
	(void)gfp;
	return alloc_fails() ? NULL : calloc(1, bytes);
}

void kvfree(void *memory)
{
	free(memory);
}

void call_rcu(struct rcu_head *head, void (*func)(struct rcu_head *head))
{
	head->func = func;
	head->next = SHIM_LOAD(&dying);
	while (!__atomic_compare_exchange_n(&dying, &head->next, head, false,
					    __ATOMIC_RELEASE, __ATOMIC_RELAXED))
		;
}

void rcu_barrier(void)
{
	struct rcu_head *head = __atomic_exchange_n(&dying, NULL, __ATOMIC_ACQUIRE);

	while (head) {
		struct rcu_head *next = head->next;

		head->func(head);
		head = next;
	}
}
