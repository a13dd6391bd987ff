/* The nine functions that TensorRT's Python bindings import from libnvinfer, libnvinfer_plugin and libnvonnxparser.
 *
 * Compiled three times, under the three sonames, they let the real bindings load where TensorRT's libraries cannot be
 * had. Every factory returns null, as the real library does where it finds no GPU, after logging why.
 *
 * LOG_SLOT is the place of ILogger::log in its table of virtual functions: first in TensorRT 10; in TensorRT 11
 * behind getInterfaceInfo, getAPILanguage and the two destructors.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef void (*log_function)(void *self, int32_t severity, char const *message);

enum { SEVERITY_ERROR = 1, SEVERITY_VERBOSE = 4 };

static void *refuse(void *logger)
{
    if (logger != NULL) {
        log_function const *table = *(log_function const **)logger;
        table[LOG_SLOT](logger, SEVERITY_VERBOSE, "stub: a message that nobody should keep");
        table[LOG_SLOT](logger, SEVERITY_ERROR, "stub: CUDA initialization failure with error: 100");
    }
    return NULL;
}

void *createInferBuilder_INTERNAL(void *logger, int32_t version) { (void)version; return refuse(logger); }
void *createInferRuntime_INTERNAL(void *logger, int32_t version) { (void)version; return refuse(logger); }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int32_t version)
{
    (void)engine, (void)version;
    return refuse(logger);
}
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int32_t version)
{
    (void)network, (void)version;
    return refuse(logger);
}
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int32_t version)
{
    (void)refitter, (void)version;
    return refuse(logger);
}
void *getBuilderPluginRegistry(int32_t capability) { (void)capability; return NULL; }
void *getPluginRegistry(void) { return NULL; }
int32_t getNvOnnxParserVersion(void) { return 0; }
bool initLibNvInferPlugins(void *logger, char const *name_space) { (void)logger, (void)name_space; return false; }
