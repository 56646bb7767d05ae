// Stands for torch's header in a program without torch: the ops use nothing of it.
#pragma once
