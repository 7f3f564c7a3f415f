// SPDX-License-Identifier: GPL-2.0-only
#include <dlfcn.h>
#include <string.h>

#include "nbd-calls.h"

struct nbd_calls nbd;

bool load_libnbd(void)
{
	static const struct {
		const char *name;
		void *call;		/* where its address goes */
	} calls[] = {
		{ "nbd_create", &nbd.create },
		{ "nbd_close", &nbd.close },
		{ "nbd_get_errno", &nbd.get_errno },
		{ "nbd_add_meta_context", &nbd.add_meta_context },
		{ "nbd_set_export_name", &nbd.set_export_name },
		{ "nbd_connect_unix", &nbd.connect_unix },
		{ "nbd_connect_tcp", &nbd.connect_tcp },
		{ "nbd_can_meta_context", &nbd.can_meta_context },
		{ "nbd_get_size", &nbd.get_size },
		{ "nbd_block_status", &nbd.block_status },
		{ "nbd_shutdown", &nbd.shutdown },
		{ "nbd_aio_connect_socket", &nbd.aio_connect_socket },
		{ "nbd_aio_is_connecting", &nbd.aio_is_connecting },
		{ "nbd_aio_is_ready", &nbd.aio_is_ready },
		{ "nbd_aio_get_fd", &nbd.aio_get_fd },
		{ "nbd_aio_get_direction", &nbd.aio_get_direction },
		{ "nbd_aio_notify_read", &nbd.aio_notify_read },
		{ "nbd_aio_notify_write", &nbd.aio_notify_write },
		{ "nbd_aio_pread", &nbd.aio_pread },
		{ "nbd_aio_pwrite", &nbd.aio_pwrite },
		{ "nbd_aio_zero", &nbd.aio_zero },
		{ "nbd_aio_flush", &nbd.aio_flush },
		{ "nbd_aio_block_status", &nbd.aio_block_status },
	};
	void *library = dlopen("libnbd.so.0", RTLD_NOW | RTLD_LOCAL);

	for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
		void *address = library ? dlsym(library, calls[i].name) : NULL;

		if (!address)
			return false;
		memcpy(calls[i].call, &address, sizeof(address));
	}
	return true;
}
